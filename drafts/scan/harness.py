"""Variants of the scan's backward: checks against float64 and against the product, times, all in one run."""
import argparse, contextlib, dataclasses, json, math, os, statistics, subprocess, sys, time
from pathlib import Path
import torch
from statescan.ops import _cuda, selective_scan
from statescan.ops.selective_scan import cuda as M

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))
from variants import VARIANTS  # name -> dict(file, options, threads, parts, history, extra bytes, last)

import ast

PRODUCT = M._BACKWARD
tree = ast.parse((HERE / "cuda3.py").read_text())
wanted = {"_halves", "_backward_options", "_backward_kernel", "_backward"}
part_ = ast.Module([ast.ImportFrom("__future__", [ast.alias("annotations")], 0)] + [n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name in wanted], [])
exec(compile(ast.fix_missing_locations(part_), "cuda3.py", "exec"), M.__dict__)
options0, halves0 = M._backward_options, M._halves
current = {"v": None}


def options(c, part, *beside, again=False):
    o, v = options0(c, part, *beside, again=again), current["v"]
    if v is not None and c.u.dtype == torch.bfloat16:
        o.update(v["options"])
    return o


M._backward_options = options
M._halves = lambda c, *beside: halves0(c, *beside) if current["v"] and current["v"]["halves"] else 1


@contextlib.contextmanager
def using(name, dtype=torch.bfloat16):
    v = VARIANTS[name]
    current["v"] = None if name == "now" else v
    current["dtype"] = dtype
    M._BACKWARD = PRODUCT if name == "now" else HERE / v.get("file", "v3.cu")
    yield
    current["v"], M._BACKWARD = None, PRODUCT


def problem(batch, length, d_inner, dtype=torch.bfloat16, n=16, seed=0, B_scale=1.0):
    g = torch.Generator(device="cuda").manual_seed(seed)
    def r(*s): return torch.randn(*s, device="cuda", generator=g)
    u, z, B, C, dy = (r(batch, length, d_inner).to(dtype), r(batch, length, d_inner).to(dtype), r(batch, length, n).to(dtype),
                      r(batch, length, n).to(dtype), r(batch, length, d_inner).to(dtype))
    dt = (0.5 * r(batch, length, d_inner)).to(dtype)
    A = -torch.arange(1, n + 1, device="cuda").float().repeat(d_inner, 1) * (1 + 0.1 * torch.rand(d_inner, n, device="cuda", generator=g))
    D = r(d_inner)
    t = torch.exp(torch.rand(d_inner, device="cuda", generator=g) * (math.log(0.1) - math.log(1e-3)) + math.log(1e-3))
    bias = t + torch.log(-torch.expm1(-t))
    return dict(u=u, dt=dt, A=A, B=B, C=C, D=D, z=z, bias=bias, dy=dy)


def call(p, ck=None):
    a = (p["u"], p["dt"], p["A"], p["B"], p["C"], p["D"], p["z"], p["bias"], True)
    if ck is None:
        ck = M.launch_forward(*a)[2]
    return lambda: M.launch_backward(*a, dy=p["dy"], checkpoints=ck)


NAMES = ("du", "ddt", "dA", "dB", "dC", "dD", "dz", "dbias")


def truth(p, dtype, chunk=None):
    leaves = {k: p[k].to(dtype).clone().requires_grad_() for k in ("u", "dt", "A", "B", "C", "D", "z", "bias")}
    l = leaves
    dt = torch.nn.functional.softplus(l["dt"] + l["bias"])
    h, out = 0, []
    for t in range(p["u"].shape[1]):
        h = torch.exp(dt[:, t, :, None] * l["A"]) * h + (dt[:, t] * l["u"][:, t])[..., None] * l["B"][:, t, None, :]
        out.append((h * l["C"][:, t, None, :]).sum(-1))
    y = (torch.stack(out, 1) + l["D"] * l["u"]) * torch.nn.functional.silu(l["z"])
    g = torch.autograd.grad(y, [leaves[k] for k in ("u", "dt", "A", "B", "C", "D", "z", "bias")], p["dy"].to(dtype))
    return g


def check(names, out):
    """Norm of the error over that of the same-precision reference, worst draw; bit-equality of two runs."""
    for shape in ((2, 160, 128), (1, 300, 64), (3, 77, 192), (1, 1100, 256), (2, 33, 256)):
        p = problem(*shape, seed=shape[1])
        want, ref = truth(p, torch.float64), truth(p, torch.float32)
        for name in names:
            with using(name):
                try:
                    run = call(p)
                    got, twice = run(), run()
                    torch.cuda.synchronize()
                except Exception as e:
                    print("CHECK", name, shape, "FAILED", repr(e)[:300], flush=True)
                    continue
            row = {}
            for k, g, g2, w, r in zip(NAMES, got, twice, want, ref):
                r = r.to(g.dtype).double()
                row[k] = round(float((g.double() - w).norm() / (r - w).norm()), 2)
                if not torch.equal(g, g2): row[k] = (row[k], "NOT THE SAME BITS")
            print("CHECK", name, shape, row, flush=True)
            out.setdefault("check", []).append((name, shape, row))


SHAPES = [(8, 2048, 2048), (8, 2048, 4096), (1, 2048, 1536), (1, 65536, 2048)]


def graph(f, n):
    f(); torch.cuda.synchronize()
    s = torch.cuda.Stream()
    with torch.cuda.stream(s):
        f()
    torch.cuda.synchronize()
    g = torch.cuda.CUDAGraph()
    with torch.cuda.graph(g):
        for _ in range(n): f()
    return g


def measure(graphs, n, rounds, each):
    times = {k: [] for k in graphs}
    a, b = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    for _ in range(rounds):
        for k, g in graphs.items():
            g.replay()
            for _ in range(each):
                a.record(); g.replay(); b.record(); b.synchronize()
                times[k].append(a.elapsed_time(b) / n[k])
    return {k: (round(statistics.median(t), 4), round(min(t), 4)) for k, t in times.items()}


def times(names, out, deadline, shapes=SHAPES):
    for shape in shapes:
        if time.time() > deadline: print("no time for", shape); break
        p = problem(*shape)
        ck = M.launch_forward(p["u"], p["dt"], p["A"], p["B"], p["C"], p["D"], p["z"], p["bias"], True)[2]
        n = 2 if shape[0] * shape[1] * shape[2] > 1 << 24 else 10
        graphs, base = {}, None
        for name in names:
            with using(name):
                try:
                    run = call(p, ck)
                    got = run(); torch.cuda.synchronize()
                    if base is None: base = got
                    diff = {k: round(float((a.double() - b.double()).norm() / b.double().norm()), 6) for k, a, b in zip(NAMES, got, base) }
                    print("DIFF", shape, name, {k: d for k, d in diff.items() if d}, flush=True)
                    del got
                    graphs[name] = graph(run, n)
                except Exception as e:
                    print("TIME", name, shape, "FAILED", repr(e)[:300], flush=True)
        r = measure(graphs, {k: n for k in graphs}, 4, 5)
        for k, t in r.items(): print("TIME", shape, "%-12s" % k, t, flush=True)
        out.setdefault("times", {})[str(shape)] = r
        del graphs, base, p, ck
        torch.cuda.empty_cache()


def others(out):
    for shape, dtype in [((8, 2048, 2048), torch.float32), ((1, 65536, 2048), torch.float32)] + [(s, torch.bfloat16) for s in SHAPES]:
        p = problem(*shape, dtype=dtype)
        a = (p["u"], p["dt"], p["A"], p["B"], p["C"], p["D"], p["z"], p["bias"], True)
        current["dtype"] = dtype
        ck = M.launch_forward(*a)[2]
        gs = {"forward": graph(lambda: M.launch_forward(*a), 2)}
        if dtype == torch.float32: gs["backward"] = graph(call(p, ck), 2)
        r = measure(gs, {k: 2 for k in gs}, 2, 5)
        print("PRODUCT", shape, dtype, r, flush=True)
        out.setdefault("product", []).append((shape, str(dtype), r))


def attributes(names):
    from cuda.bindings import driver as d
    A = d.CUfunction_attribute
    for name in names:
        with using(name):
            for shape, part in (((8, 2048, 2048), 0), ((1, 65536, 2048), 1)):
                p = {k: v for k, v in problem(1, 32, shape[2]).items()}
                cut = M.plan(*shape, 16, 1, 132, False, False, False, M._room(torch.cuda.get_device_properties(0)))
                c = M._prepare(p["u"], p["dt"], p["A"], p["B"], p["C"], p["D"], p["z"], p["bias"], True, None, None, False)
                c = dataclasses.replace(c, plan=cut)
                try:
                    k = M._backward_kernel(c, part, p["dy"])
                except Exception as e:
                    print("ATTR", name, "FAILED", repr(e)[:500], flush=True); continue
                get = lambda which: d.cuKernelGetAttribute(which, k._handle, 0)[1]
                blocks = d.cuOccupancyMaxActiveBlocksPerMultiprocessor(d.CUfunction(k._handle), k.threads, k.shared)
                print("ATTR", name, "pass", part, "registers", get(A.CU_FUNC_ATTRIBUTE_NUM_REGS), "local", get(A.CU_FUNC_ATTRIBUTE_LOCAL_SIZE_BYTES),
                      "shared", k.shared, "threads", k.threads, "blocks", blocks, flush=True)


def main():
    q = argparse.ArgumentParser()
    q.add_argument("what"); q.add_argument("names", nargs="*"); q.add_argument("--out"); q.add_argument("--seconds", type=float, default=25)
    a = q.parse_args()
    names = a.names or list(VARIANTS)
    out = {}
    start = time.time()
    if a.what == "check":
        try: attributes(names)
        except Exception as e: print("ATTR FAILED", repr(e)[:400])
        check(names, out)
    elif a.what == "time":
        times(names, out, start + a.seconds)
    elif a.what == "others":
        others(out)
    elif a.what == "best":
        t = json.loads(Path(a.names[0]).read_text())["times"]
        from statistics import geometric_mean
        score = {n: geometric_mean([x[n][0] / x["now"][0] for x in t.values()]) for n in VARIANTS if all(n in x for x in t.values())}
        ok = lambda n: "FAILED" not in (Path(a.names[0]).parent / f"check-{n}.txt").read_text()
        best = min((n for n in score if n != "now" and ok(n)), key=score.get)
        print("SCORE", {n: round(s, 4) for n, s in sorted(score.items(), key=lambda q: q[1])}, file=sys.stderr)
        v = VARIANTS[best]
        text = (HERE / v["file"]).read_text()
        Path(a.names[1]).write_text("".join(f"#define {k} {x}\n" for k, x in v["options"].items()) + text)
        print(best, file=sys.stderr)
        Path(a.names[1] + ".halves").write_text(str(int(v["halves"])))
        return
    elif a.what == "small":
        p = problem(1, 330, 256)
        with using(names[0]):
            call(p)()
        p = problem(2, 70, 128)
        with using(names[0]):
            call(p)()
        torch.cuda.synchronize()
    elif a.what == "one":
        p = problem(8, 2048, 2048)
        with using(names[0]):
            run = call(p)
            for _ in range(2): run()
            torch.cuda.synchronize()
    if a.out: Path(a.out).write_text(json.dumps(out))
    print("seconds", round(time.time() - start, 1))


main()
