def v(halves=False, file="v3.cu", **options):
    return dict(file=file, options=options, halves=halves)


VARIANTS = {
    "now": {},
    "one": v(),
    "onelite": v(LITE=1),
    "one16": v(UNROLL_SUMS=16),
    "two": v(True),
    "twolite": v(True, LITE=1),
    "two16": v(True, UNROLL_SUMS=16),
    "two32": v(True, UNROLL_SUMS=32, LITE=1),
}
