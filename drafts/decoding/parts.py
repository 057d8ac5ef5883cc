"""python parts.py base|projection|tiles|step|sizes OUT: times of a decoding step's launches at the 1.4b shape."""
import json, sys, time, traceback
from pathlib import Path
import torch
import torch.nn.functional as F
from statescan.ops.mamba_step.cuda import Pieces
from statescan.ops.mamba_step.middle import Middle, MiddleTiles
from statescan.ops.mamba_step.projection import Projection
from statescan.ops.mamba_step.validation import BlockWeights
from statescan.ops.packed_linear.validation import PackedWeight

NAMES, OUT = sys.argv[1], Path(sys.argv[2])
TINY = len(sys.argv) > 3
D, E, R, L, ROWS = 2048, 4096, 128, 48, 128
if TINY: L = 2
dev = torch.device("cuda", 0)
bf = torch.bfloat16
results = {}
started = time.time()

def note(name, value):
    results[name] = value
    print(f"{time.time() - started:6.1f}s {name}: {value}", flush=True)
    (OUT / f"{NAMES}.json").write_text(json.dumps(results, indent=1))

def attempt(name, f):
    try:
        note(name, f())
    except Exception as e:
        note(name, f"FAILED {type(e).__name__}: {e}"[:600])
        traceback.print_exc()

def graph_us(launches, per=1, replays=15):
    """us a layer of launches (a list of callables) captured into one graph; median of replays."""
    for f in launches[:2]: f()
    torch.cuda.synchronize()
    g = torch.cuda.CUDAGraph()
    with torch.cuda.graph(g):
        for f in launches: f()
    for _ in range(3): g.replay()
    times = []
    for _ in range(replays):
        a, b = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        a.record(); g.replay(); b.record(); torch.cuda.synchronize()
        times.append(a.elapsed_time(b) * 1e3 / len(launches))
    times.sort()
    return round(times[len(times) // 2] / per, 2)

def blocks(layers):
    g = torch.Generator("cuda").manual_seed(0)
    def draw(*s, scale=1.0): return scale * torch.randn(*s, generator=g, device=dev)
    def weight(o, c): return PackedWeight(draw(o, c, scale=c**-0.5).to(bf))
    return [BlockWeights(norm=1 + draw(D, scale=.1), in_proj=weight(2*E, D), conv_weight=draw(E, 4, scale=.5), x_proj=weight(R+32, E),
        dt_proj=weight(E, R), A=-.1 - 16 * draw(E, 16).abs(), out_proj=weight(D, E), conv_bias=draw(E, scale=.1), dt_bias=draw(E) - 3, D=draw(E)) for _ in range(layers)]

def relative(a, b): return float((a.double() - b.double()).norm() / b.double().norm())

def mid_pieces(p, w, uz, conv, ssm, u, y):
    p.conv_step(uz[:, :E], conv, w.conv_weight, w.conv_bias, u)
    sel = F.linear(u, w.x_proj.data)
    low, B, C = sel.split([R, 16, 16], 1)
    dt = F.linear(low, w.dt_proj.data)
    p.state_step(ssm, u, uz[:, E:], dt, w.A, B, C, w.D, w.dt_bias, y)

pieces = Pieces(bf, dev)

@torch.no_grad()
def section(SECTION):
    if SECTION in ("base", "projection", "tiles"):
        bs = blocks(L)
        x = torch.randn(ROWS, D, device=dev).to(bf)
        y = torch.randn(ROWS, E, device=dev).to(bf)
        uz = torch.randn(ROWS, 2*E, device=dev).to(bf)
        u = torch.randn(ROWS, E, device=dev).to(bf)
        note("device", torch.cuda.get_device_name())
    if SECTION == "base":
        big = torch.empty(512 * 2**20, dtype=torch.float32, device=dev)
        def copy():
            half = big.numel() // 2
            big[:half].copy_(big[half:]); torch.cuda.synchronize()
            a, b = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            a.record(); [big[:half].copy_(big[half:]) for _ in range(5)]; b.record(); torch.cuda.synchronize()
            return round(big.numel() * 4 * 5 / a.elapsed_time(b) / 1e9, 3)
        attempt("copy TB/s", copy)
        del big
        stream = torch.randn(ROWS, D, device=dev); parts = torch.randn(4, ROWS, D, device=dev).to(bf); normed = torch.empty_like(x)
        attempt("norm of four parts", lambda: graph_us([lambda w=w: pieces.add_norm(parts, stream, stream, w.norm, 1e-5, normed) for w in bs]))
        attempt("in_proj cublas", lambda: graph_us([lambda w=w: F.linear(x, w.in_proj.data) for w in bs]))
        for n in (2, 4):
            attempt(f"in_proj cublas {n} parts", lambda: graph_us([lambda w=w: torch.bmm(x.view(ROWS, n, D//n).transpose(0, 1), w.in_proj.data.view(-1, n, D//n).permute(1, 2, 0)) for w in bs]))
        attempt("out_proj cublas", lambda: graph_us([lambda w=w: F.linear(y, w.out_proj.data) for w in bs]))
        attempt("out_proj cublas 4 parts", lambda: graph_us([lambda w=w: torch.bmm(y.view(ROWS, 4, E//4).transpose(0, 1), w.out_proj.data.view(-1, 4, E//4).permute(1, 2, 0)) for w in bs]))
        conv = torch.randn(L, ROWS, 3, E, device=dev); ssm = torch.randn(L, ROWS, E, 16, device=dev)
        attempt("conv", lambda: graph_us([lambda i=i, w=w: pieces.conv_step(uz[:, :E], conv[i], w.conv_weight, w.conv_bias, u) for i, w in enumerate(bs)]))
        attempt("x_proj", lambda: graph_us([lambda w=w: F.linear(u, w.x_proj.data) for w in bs]))
        sel = torch.randn(ROWS, R + 32, device=dev).to(bf); low, B, C = sel.split([R, 16, 16], 1)
        attempt("dt_proj", lambda: graph_us([lambda w=w: F.linear(low, w.dt_proj.data) for w in bs]))
        dt = torch.randn(ROWS, E, device=dev).to(bf) - 3
        attempt("state", lambda: graph_us([lambda i=i, w=w: pieces.state_step(ssm[i], u, uz[:, E:], dt, w.A, B, C, w.D, w.dt_bias, y) for i, w in enumerate(bs)]))
        attempt("middle in pieces", lambda: graph_us([lambda i=i, w=w: mid_pieces(pieces, w, uz, conv[i], ssm[i], u, y) for i, w in enumerate(bs)]))
        m = Middle(bs[0], dev)
        attempt("middle.cu", lambda: graph_us([lambda i=i, w=w: m(uz, conv[i], ssm[i], w, y) for i, w in enumerate(bs)]))
        head = torch.randn(50280, D, device=dev).to(bf); logits = torch.empty(ROWS, 50280, device=dev)
        attempt("head", lambda: graph_us([lambda: torch.mm(x, head.t(), out_dtype=torch.float32, out=logits)] * 4))
    elif SECTION == "projection":
        ins, outs = [w.in_proj.data for w in bs], [w.out_proj.data for w in bs]
        def right(weights, parts, a, **o):
            run = Projection(weights, parts, **o)
            got = run(1, a, None)
            exact = a.double() @ weights[1].double().T
            total = got if parts == 1 else got.float().sum(0)
            return {"error": relative(total, exact), "cublas": relative(F.linear(a, weights[1]), exact), "again": torch.equal(run(1, a, None), got)}
        stream = torch.randn(ROWS, D, device=dev); normed = torch.empty_like(x)
        p4 = torch.randn(4, ROWS, D, device=dev).to(bf)
        def took(weights, parts, a, o, replays=7):
            r = Projection(weights, parts, **o)
            return graph_us([lambda i=i: r(i, a, None) for i in range(L)], replays=replays)
        def pair(i, r, weights):
            pieces.add_norm(p4, stream, stream, bs[i].norm, 1e-5, normed)
            r(i, normed, None) if r is not None else F.linear(normed, weights[i])
        base = {"CL": 2, "STAGES": 8, "EARLY": 1, "HINT": 0, "GROUP": 1, "STAGGER": 0, "PROMOTION": 3}
        attempt("right in, first", lambda: right(ins, 1, x, **base))
        seen_in, seen_out = [], []
        for change in ({}, {"CL": 1}, {"STAGES": 9}, {"STAGES": 6}, {"HINT": 1}, {"PROMOTION": 2}, {"GROUP": 2}, {"GROUP": 4}, {"STAGGER": 1}, {"HINT": 1, "GROUP": 2}, {"CL": 1, "HINT": 1}, {"CL": 1, "GROUP": 2}, {"CL": 1, "STAGGER": 1, "GROUP": 2}):
            o = {**base, **change}
            try:
                r = Projection(ins, 1, **o)
                together = graph_us([lambda i=i: pair(i, r, ins) for i in range(L)], replays=7)
                seen_in.append((together, took(ins, 1, x, o, 7), o))
                seen_out.append((took(outs, 4, y, o, 7), o))
                print(change, seen_in[-1][:2], seen_out[-1][0], flush=True)
            except Exception as e: note(f"{o}", f"FAILED {e}"[:300])
        note("in: with the norm, alone", [[a, b, {k: v for k, v in o.items() if v != base[k]}] for a, b, o in seen_in])
        note("out", [[a, {k: v for k, v in o.items() if v != base[k]}] for a, o in seen_out])
        final = sorted((a, o) for a, _, o in [(a, b, json.dumps(o)) for a, b, o in seen_in])
        final = [(a, json.loads(o)) for a, o in final]
        best = final[0][1]
        outs_ = [(a, json.loads(o)) for a, o in sorted((a, json.dumps(o)) for a, o in seen_out)]
        attempt("right in", lambda: right(ins, 1, x, **best))
        attempt("right out", lambda: right(outs, 4, y, **outs_[0][1]))
        attempt("in, not early", lambda: took(ins, 1, x, {**best, "EARLY": 0}))
        attempt("norm+in cublas", lambda: graph_us([lambda i=i: pair(i, None, ins) for i in range(L)]))
        attempt("in cublas", lambda: graph_us([lambda i=i: F.linear(x, ins[i]) for i in range(L)]))
        attempt("out cublas", lambda: graph_us([lambda i=i: torch.bmm(y.view(ROWS, 4, E//4).transpose(0, 1), outs[i].view(-1, 4, E//4).permute(1, 2, 0)) for i in range(L)]))
        (OUT / "choice.json").write_text(json.dumps({"in": best, "out": outs_[0][1], "in us": final[0][0], "out us": outs_[0][0]}))
        for rows in (16, 64):
            xs, ys = x[:rows].clone(), y[:rows].clone()
            attempt(f"in {rows} rows, cublas and own", lambda: [graph_us([lambda i=i: F.linear(xs, ins[i]) for i in range(L)]), took(ins, 1, xs, best)])
            attempt(f"out {rows} rows, cublas and own", lambda: [graph_us([lambda i=i: torch.bmm(ys.view(rows, 4, E//4).transpose(0, 1), outs[i].view(-1, 4, E//4).permute(1, 2, 0)) for i in range(L)]), took(outs, 4, ys, outs_[0][1])])
    elif SECTION == "tiles":
        conv = torch.randn(L, ROWS, 3, E, device=dev); ssm = torch.randn(L, ROWS, E, 16, device=dev)
        def right(**o):
            run, w = MiddleTiles(bs[0], dev, **o), bs[1]
            c1, s1, y1 = conv[1].clone(), ssm[1].clone(), torch.full_like(y, float("nan"))
            mid_pieces(pieces, w, uz, c1, s1, u, y1)
            c2, s2, y2 = conv[1].clone(), ssm[1].clone(), torch.full_like(y, float("nan"))
            run(uz, c2, s2, w, y2)
            c3, s3, y3 = conv[1].clone(), ssm[1].clone(), torch.full_like(y, float("nan"))
            run(uz, c3, s3, w, y3)
            return {"y": relative(y2, y1), "state": relative(s2, s1), "conv": torch.equal(c1, c2), "again": torch.equal(y2, y3) and torch.equal(s2, s3) and torch.equal(c2, c3)}
        def time_it(**o):
            run = MiddleTiles(bs[0], dev, **o)
            return graph_us([lambda i=i: run(uz, conv[i], ssm[i], bs[i], y) for i in range(L)])
        for o in ({"EARLY": 0}, {"EARLY": 1}):
            attempt(f"right {o}", lambda: right(**o))
            attempt(f"tiles {o}", lambda: time_it(**o))
        conv16 = conv.to(bf)
        def time16(**o):
            run = MiddleTiles(bs[0], dev, **o)
            return graph_us([lambda i=i: run(uz, conv16[i], ssm[i], bs[i], y) for i in range(L)])
        firsts = {}
        for first in (1, 2, 3, 4):
            try: firsts[first] = time16(FIRST=first)
            except Exception as e: note(f"FIRST {first}", f"FAILED {e}"[:300])
        note("tiles, convolution's state in 16 bits, by FIRST", firsts)
        best = min(firsts, key=firsts.get)
        (OUT / "first.json").write_text(json.dumps(best))
        attempt("not early", lambda: time16(FIRST=best, EARLY=0))
        attempt("8 slots", lambda: time16(FIRST=2, SLOTS=8))
        attempt("parts in float32", lambda: time16(FIRST=best, LOW16=0))
        attempt("states before the inputs", lambda: time16(FIRST=best, AHEAD=1))
        def profile(**o):
            run = MiddleTiles(bs[0], dev, PROFILE=1, **o)
            graph_us([lambda i=i: run(uz, conv16[i], ssm[i], bs[i], y) for i in range(L)], replays=3)
            n = ROWS // 16
            marks = run._counters.view(torch.int64)[n * 32 : n * 32 + n * (E // 256) * 8].view(-1, 8).double()
            marks -= marks[:, :1].min()
            return {"mean": [round(v) for v in marks.mean(0).tolist()], "first": [round(v) for v in marks.min(0).values.tolist()], "last": [round(v) for v in marks.max(0).values.tolist()]}
        for first in (best, 1):
            attempt(f"profile FIRST {first} (start, may read, convolved, parts out, met, added up, dt, end)", lambda: profile(EARLY=0, FIRST=first))
        attempt("middle in pieces, 16 bits", lambda: graph_us([lambda i=i, w=w: mid_pieces(pieces, w, uz, conv16[i], ssm[i], u, y) for i, w in enumerate(bs)]))
    elif SECTION == "step":
        from statescan.bench.model_runs import _random_model
        from statescan.generate import graphs
        from statescan.generate.graphs import GraphDecoder
        graphs._OWN = True
        from statescan.generate.packed import PackedModel
        model = _random_model("tiny" if TINY else "1.4b", "cuda", "bfloat16")
        packed = PackedModel(model, "bfloat16"); del model; torch.cuda.empty_cache()
        note("built", 1)
        def measured(name, rows, change, keep={}):
            slots = GraphDecoder(packed, rows, 50257 if not TINY else 257)
            change(slots)
            g = torch.Generator("cuda").manual_seed(1)
            slots.tokens.copy_(torch.randint(0, 250, (rows,), generator=g, device=dev))
            from statescan.generate import SamplingParams
            for r in range(rows): slots.place(r, SamplingParams(temperature=0, max_new_tokens=100), 1, [])
            slots.step(rows); torch.cuda.synchronize()
            slots.tokens.copy_(torch.randint(0, 250, (rows,), generator=g, device=dev))
            slots.state.ssm.zero_(); slots.state.conv.zero_()
            for _ in range(3): slots.step(rows)
            logits = slots.logits.clone(); tokens = slots.tokens.clone()
            times = []
            for _ in range(15):
                a, b = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                a.record(); slots.step(rows); b.record(); torch.cuda.synchronize()
                times.append(a.elapsed_time(b))
            times.sort()
            first = keep.setdefault(rows, (logits, tokens))
            note(f"{name}, {rows} rows", {"ms": round(times[7], 4), "min": round(times[0], 4), "logits against the first": relative(logits, first[0]), "tokens": float((tokens == first[1]).float().mean())})
            return slots
        def wide(s): s.state.conv = s.state.conv.float()
        def committed(s): s._tiles = None; s._projections = [None, None]; wide(s)
        choice = json.loads((OUT / "choice.json").read_text()) if (OUT / "choice.json").exists() else {"in": {}, "out": {}}
        first = json.loads((OUT / "first.json").read_text()) if (OUT / "first.json").exists() else 4
        def own(s, into=True, out=True, **tiles):
            s._tiles = MiddleTiles(packed.blocks[0], dev, **{"FIRST": first, **tiles})
            s._projections = [Projection([b.in_proj.data for b in packed.blocks], 1, **choice["in"]) if into else None, Projection([b.out_proj.data for b in packed.blocks], 4, **choice["out"]) if out else None]
        def pieces16(s): s._tiles = None; s._projections = [None, None]
        def fewer(n):
            def change(s): own(s); s._draw_blocks = n
            return change
        variants = {
            "committed": committed,
            "tiles, cublas": lambda s: own(s, False, False), "tiles, own in_proj": lambda s: own(s, True, False), "tiles, own out_proj": lambda s: own(s, False, True), "all": own,
            "all, states before the inputs": lambda s: own(s, AHEAD=1), "all, states before the inputs, 2 first": lambda s: own(s, AHEAD=1, FIRST=2), "all, parts in float32": lambda s: own(s, LOW16=0), "all, FIRST 2": lambda s: own(s, FIRST=2), "all, tiles not early": lambda s: own(s, EARLY=0),
            "all, not cooperative": lambda s: own(s, COOPERATIVE=0), "all, draws by 4 blocks": fewer(4), "all, draws by 2 blocks": fewer(2)}
        from torch.profiler import ProfilerActivity, profile
        def table(slots, rows):
            with profile(activities=[ProfilerActivity.CUDA]) as p:
                for _ in range(2): slots.step(rows)
                torch.cuda.synchronize()
            rows_ = sorted(((e.key[:60], e.count, round(e.device_time_total / max(1, e.count), 2), round(e.device_time_total / 2, 1)) for e in p.key_averages()), key=lambda v: -v[3])
            return rows_[:14]
        for name, change in variants.items():
            try:
                s = measured(name, ROWS, change)
                if name in ("tiles, cublas", "all"): attempt(f"profile {name}", lambda: table(s, ROWS))
            except Exception as e:
                note(f"{name}", f"FAILED {e}"[:500]); traceback.print_exc()
                if "CUDA" in str(e): raise
        took = {n: results[f"{n}, {ROWS} rows"]["ms"] for n in ("tiles, cublas", "tiles, own in_proj", "tiles, own out_proj", "all", "all, states before the inputs") if f"{n}, {ROWS} rows" in results}
        note("fastest", min(took, key=took.get))
        for rows in (64, 16, 96):
            for name in ("committed", "all"):
                try: measured(name, rows, variants[name])
                except Exception as e: note(f"{name}, {rows}", f"FAILED {e}"[:500])
    elif SECTION == "engine":
        from statescan.bench import model_runs
        from statescan.generate import graphs
        step = json.loads((OUT / "step.json").read_text()) if (OUT / "step.json").exists() else {}
        choice = json.loads((OUT / "choice.json").read_text()) if (OUT / "choice.json").exists() else {"in": {}, "out": {}}
        first = json.loads((OUT / "first.json").read_text()) if (OUT / "first.json").exists() else 4
        which = step.get("fastest", "tiles, cublas")
        graphs._OWN = True
        from statescan.ops.mamba_step import middle, projection
        plain_p, plain_m = projection.Projection.__init__, middle.MiddleTiles.__init__
        projection.Projection.__init__ = lambda self, weights, parts=1, **o: plain_p(self, weights, parts, **{**(choice["in"] if parts == 1 else choice["out"]), **o})
        middle.MiddleTiles.__init__ = lambda self, block, device, **o: plain_m(self, block, device, **{"FIRST": first, "AHEAD": int("before" in which), **o})
        refuse = projection.refuses_projection
        def chosen(weight, parts):
            if which == "tiles, cublas" or (which == "tiles, own in_proj" and parts > 1) or (which == "tiles, own out_proj" and parts == 1): return "not chosen"
            return refuse(weight, parts)
        projection.refuses_projection = chosen
        for preset, batch in (("1.4b", 128), ("1.4b", 64), ("1.4b", 16)):
            job = {"device": "cuda", "implementation": "statescan", "preset": preset, "batch": batch, "new": 128, "length": 2048, "dtype": "bfloat16", "repeats": 2}
            def whole():
                got = model_runs.generate(job)
                return {"ms": [v * 1e3 for v in got["samples"]], "verdicts": {k: (v.error, v.limit) for k, v in got["verdicts"].items()}, "prefill": got["prefill_tokens_per_second"], "peak GiB": got["peak_memory_bytes"] / 2**30}
            attempt(f"engine {preset} {batch} ({which})", whole)
            torch.cuda.empty_cache()


for one in NAMES.split(","):
    section(one)
