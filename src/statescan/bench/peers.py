"""The peers, run on the same random weights: transformers, mambapy, and llama.cpp through its C API.

Every adapter takes a `CausalLM` and builds the peer's model from its weights, so that outputs can be compared before a
figure is believed.
"""

# The peers are no dependency of ours: where they are not installed nothing here is called.
# pyright: reportMissingImports=false

from __future__ import annotations

import ctypes
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from statescan.models import CausalLM
from statescan.models.baseline_config import mamba_config

__all__ = ["GgmlScan", "LlamaCpp", "mamba_ssm_model", "mambapy_model", "transformers_model", "write_gguf"]


def transformers_model(model: CausalLM, *, associative_scan: bool = True, mambapy: bool = False) -> Any:
    """transformers' MambaForCausalLM with the weights of `model`, in its dtype."""
    from transformers import MambaConfig, MambaForCausalLM

    c = mamba_config("peer", model.config)
    weights = {k.replace("backbone.embedding.", "backbone.embeddings."): v for k, v in model.state_dict().items()}
    config = MambaConfig(
        vocab_size=model.backbone.embedding.weight.shape[0],
        hidden_size=c.d_model,
        num_hidden_layers=c.n_layer,
        state_size=c.d_state,
        conv_kernel=c.d_conv,
        expand=c.expand,
        time_step_rank=c.dt_rank,
        use_bias=c.bias,
        use_conv_bias=c.conv_bias,
        residual_in_fp32=c.residual_in_fp32,
        layer_norm_epsilon=c.norm_epsilon,
        initializer_range=0.02,
        use_associative_scan=associative_scan,
        use_mambapy=mambapy,
    )
    theirs = MambaForCausalLM(config).to(next(model.parameters()).dtype)  # pyright: ignore[reportArgumentType]
    missing, surplus = theirs.load_state_dict(weights, strict=False)
    if [k for k in missing if not k.startswith("lm_head")] or surplus:
        raise RuntimeError(f"transformers' Mamba did not take the weights: missing {missing}, surplus {surplus}")
    return theirs


class _MambapyLM(torch.nn.Module):
    """mambapy's layers between our embedding, final norm and tied head (its own `lm` module needs CUDA to import)."""

    def __init__(self, model: CausalLM, pscan: bool) -> None:
        super().__init__()
        from mambapy.mamba import Mamba, MambaConfig

        c = mamba_config("peer", model.config)
        self.layers = Mamba(
            MambaConfig(
                d_model=c.d_model,
                n_layers=c.n_layer,
                d_state=c.d_state,
                d_conv=c.d_conv,
                expand_factor=c.expand,
                rms_norm_eps=c.norm_epsilon,
                pscan=pscan,
            )
        )
        self.embedding = torch.nn.Embedding.from_pretrained(
            model.backbone.embedding.weight.detach().clone(), freeze=False
        )
        self.norm_weight = torch.nn.Parameter(model.backbone.norm_f.weight.detach().clone())
        self.eps = c.norm_epsilon
        own = self.layers.state_dict()
        for key, value in model.state_dict().items():
            name = key.removeprefix("backbone.")
            if name.startswith("layers."):
                own[name].copy_(value)

    def head(self, hidden: Tensor) -> Tensor:
        hidden = torch.nn.functional.rms_norm(hidden, (hidden.shape[-1],), self.norm_weight, self.eps)
        return torch.nn.functional.linear(hidden, self.embedding.weight)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.layers(self.embedding(ids)))

    def last_logits(self, ids: Tensor) -> Tensor:
        return self.head(self.layers(self.embedding(ids))[:, -1:])


def mambapy_model(model: CausalLM, *, pscan: bool = True) -> _MambapyLM:
    """mambapy's Mamba with the weights of `model` (pscan in training and prefill, or its sequential loop)."""
    return _MambapyLM(model, pscan)


def write_gguf(model: CausalLM, path: Path, kind: str) -> None:
    """Writes `model` as a GGUF of llama.cpp's "mamba" architecture, without a tokenizer.

    Args:
        kind: ``f32``, ``f16``, ``bf16`` or ``q8_0``; vectors, A, D and the convolution stay float32, and so does a
            matrix whose rows don't divide into q8_0's blocks of 32.
    """
    import gguf

    c = mamba_config("peer", model.config)
    kinds = gguf.GGMLQuantizationType
    wanted = {"f32": kinds.F32, "f16": kinds.F16, "bf16": kinds.BF16, "q8_0": kinds.Q8_0}[kind]
    writer = gguf.GGUFWriter(path, "mamba")
    rows = model.backbone.embedding.weight.shape[0]
    writer.add_context_length(2**20)
    writer.add_embedding_length(c.d_model)
    writer.add_feed_forward_length(0)
    writer.add_head_count(0)
    writer.add_block_count(c.n_layer)
    writer.add_ssm_conv_kernel(c.d_conv)
    writer.add_ssm_inner_size(c.d_inner)
    writer.add_ssm_state_size(c.d_state)
    dt_rank = model.state_dict()["backbone.layers.0.mixer.dt_proj.weight"].shape[1]
    writer.add_ssm_time_step_rank(dt_rank)
    writer.add_layer_norm_rms_eps(c.norm_epsilon)
    writer.add_tokenizer_model("no_vocab")
    writer.add_vocab_size(rows)

    def add(name: str, value: Tensor, matrix: bool = False) -> None:
        array = value.detach().float().contiguous().numpy()
        kind_here = wanted if matrix else kinds.F32
        if kind_here == kinds.Q8_0 and array.shape[-1] % 32:
            kind_here = kinds.F16
        if kind_here == kinds.F32:
            writer.add_tensor(name, array)
        else:
            writer.add_tensor(name, gguf.quants.quantize(array, kind_here), raw_dtype=kind_here)

    state = model.state_dict()
    add("token_embd.weight", state["backbone.embedding.weight"], True)
    add("output_norm.weight", state["backbone.norm_f.weight"])
    for i in range(c.n_layer):
        here, there = f"backbone.layers.{i}.", f"blk.{i}."
        add(there + "attn_norm.weight", state[here + "norm.weight"])
        add(there + "ssm_in.weight", state[here + "mixer.in_proj.weight"], True)
        add(there + "ssm_conv1d.weight", state[here + "mixer.conv1d.weight"].squeeze(1))
        add(there + "ssm_conv1d.bias", state[here + "mixer.conv1d.bias"])
        add(there + "ssm_x.weight", state[here + "mixer.x_proj.weight"], True)
        add(there + "ssm_dt.weight", state[here + "mixer.dt_proj.weight"], True)
        add(there + "ssm_dt.bias", state[here + "mixer.dt_proj.bias"])
        add(there + "ssm_a", -torch.exp(state[here + "mixer.A_log"].float()))
        add(there + "ssm_d", state[here + "mixer.D"])
        add(there + "ssm_out.weight", state[here + "mixer.out_proj.weight"], True)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


class LlamaCpp:
    """llama.cpp's C API (llama_decode) on a GGUF of `model`, called by ctypes with batches made beforehand."""

    def __init__(self, model: CausalLM, kind: str, *, threads: int, context: int = 4096, sequences: int = 1) -> None:
        import llama_cpp

        self.c: Any = llama_cpp
        self._log = llama_cpp.llama_log_callback(lambda *_: None)
        llama_cpp.llama_log_set(self._log, ctypes.c_void_p(0))
        llama_cpp.llama_backend_init()
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / f"model-{kind}.gguf"
            write_gguf(model, path, kind)
            params = llama_cpp.llama_model_default_params()
            if hasattr(params, "use_mmap"):
                params.use_mmap = False
            self.model = llama_cpp.llama_model_load_from_file(str(path).encode(), params)
        if not self.model:
            raise RuntimeError("llama.cpp did not load the GGUF")
        params = llama_cpp.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch = context * sequences, 2048, 512
        params.n_seq_max, params.n_threads, params.n_threads_batch, params.no_perf = sequences, threads, threads, True
        self.context = llama_cpp.llama_init_from_model(self.model, params)
        if not self.context:
            raise RuntimeError("llama.cpp did not make a context")
        self.vocab = model.backbone.embedding.weight.shape[0]
        self.sequences = sequences

    def reset(self) -> None:
        self.c.llama_memory_clear(self.c.llama_get_memory(self.context), True)

    def batch(self, tokens: np.ndarray, positions: np.ndarray, rows: np.ndarray, wants: np.ndarray) -> Any:
        made = self.c.llama_batch_init(len(tokens), 0, 1)
        made.n_tokens = len(tokens)
        for i in range(len(tokens)):
            made.token[i], made.pos[i], made.n_seq_id[i] = int(tokens[i]), int(positions[i]), 1
            made.seq_id[i][0], made.logits[i] = int(rows[i]), int(wants[i])
        return made

    def decode(self, batch: Any) -> None:
        code = self.c.llama_decode(self.context, batch)
        if code:
            raise RuntimeError(f"llama_decode returned {code}")

    def logits(self, index: int) -> np.ndarray:
        pointer = self.c.llama_get_logits_ith(self.context, index)
        return np.ctypeslib.as_array(pointer, shape=(self.vocab,)).copy()

    def prefill_call(self, ids: np.ndarray) -> Callable[[], Any]:
        """One whole prompt of sequence 0, the last position's logits only."""
        n = len(ids)
        wants = np.zeros(n, np.int8)
        wants[-1] = 1
        batch = self.batch(ids, np.arange(n), np.zeros(n, np.int32), wants)

        def call() -> None:
            self.reset()
            self.decode(batch)

        return call


class GgmlScan:
    """ggml's own selective-scan kernel (ggml_ssm_scan) on the CPU, for one (1, length, d_inner) problem in float32."""

    def __init__(self, u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, threads: int) -> None:
        import llama_cpp

        folder = Path(str(llama_cpp.__file__)).parent / "lib"
        base, cpu = (
            ctypes.CDLL(str(folder / f"lib{n}.so"), mode=ctypes.RTLD_GLOBAL) for n in ("ggml-base", "ggml-cpu")
        )
        pointer, i64 = ctypes.c_void_p, ctypes.c_int64

        class InitParams(ctypes.Structure):
            _fields_ = [("mem_size", ctypes.c_size_t), ("mem_buffer", pointer), ("no_alloc", ctypes.c_bool)]

        base.ggml_init.restype, base.ggml_init.argtypes = pointer, [InitParams]
        for name, count in (("1d", 1), ("2d", 2), ("3d", 3), ("4d", 4)):
            new = getattr(base, f"ggml_new_tensor_{name}")
            new.restype, new.argtypes = pointer, [pointer, ctypes.c_int] + [i64] * count
        base.ggml_get_data.restype, base.ggml_get_data.argtypes = pointer, [pointer]
        base.ggml_ssm_scan.restype = pointer
        # The last argument (how many states to keep) came in 2026; an older library reads one argument less.
        base.ggml_ssm_scan.argtypes = [pointer] * 8 + [i64]
        base.ggml_new_graph.restype, base.ggml_new_graph.argtypes = pointer, [pointer]
        base.ggml_build_forward_expand.argtypes = [pointer, pointer]
        base.ggml_build_forward_expand.restype = None
        cpu.ggml_graph_compute_with_ctx.argtypes = [pointer, pointer, ctypes.c_int]
        cpu.ggml_cpu_init()
        _, length, d_inner = u.shape
        n = A.shape[1]
        f32, i32 = 0, 26
        context = base.ggml_init(InitParams(2**30, None, False))

        def tensor(value: np.ndarray, kind: int, *shape: int) -> int:
            made = getattr(base, f"ggml_new_tensor_{len(shape)}d")(context, kind, *shape)
            value = np.ascontiguousarray(value)
            ctypes.memmove(base.ggml_get_data(made), value.ctypes.data, value.nbytes)
            return made

        s = tensor(np.zeros((d_inner, n), np.float32), f32, n, 1, d_inner, 1)
        x = tensor(u[0].numpy(), f32, 1, d_inner, length, 1)
        d = tensor(dt[0].numpy(), f32, d_inner, length, 1)
        a = tensor(A.numpy(), f32, n, d_inner)
        b = tensor(B[0].numpy(), f32, n, 1, length, 1)
        c = tensor(C[0].numpy(), f32, n, 1, length, 1)
        ids = tensor(np.zeros(1, np.int32), i32, 1)
        self._out = base.ggml_ssm_scan(context, s, x, d, a, b, c, ids, 1)
        graph = base.ggml_new_graph(context)
        base.ggml_build_forward_expand(graph, self._out)
        self._call = lambda: cpu.ggml_graph_compute_with_ctx(context, graph, threads)
        self._base, self._shape = base, (length, d_inner)

    def __call__(self) -> None:
        if self._call():
            raise RuntimeError("ggml did not compute the graph")

    def output(self) -> np.ndarray:
        """y of the last call, (length, d_inner), without D and z; ggml takes dt before its softplus."""
        length, d_inner = self._shape
        data = ctypes.cast(self._base.ggml_get_data(self._out), ctypes.POINTER(ctypes.c_float))
        return np.ctypeslib.as_array(data, shape=(length, d_inner)).copy()


def mamba_ssm_model(model: CausalLM) -> Any:
    """mamba_ssm's language model on a GPU, with the weights of `model` in their dtype."""
    from mamba_ssm.models.config_mamba import MambaConfig
    from mamba_ssm.models.mixer_seq_simple import MambaLMHeadModel

    c = mamba_config("peer", model.config)
    parameter = next(model.parameters())
    config = MambaConfig(
        d_model=c.d_model,
        n_layer=c.n_layer,
        vocab_size=c.vocab_size,
        ssm_cfg={"d_state": c.d_state, "d_conv": c.d_conv, "expand": c.expand},
        rms_norm=True,
        residual_in_fp32=c.residual_in_fp32,
        fused_add_norm=True,
        pad_vocab_size_multiple=c.pad_vocab_size_multiple,
        tie_embeddings=c.tie_embeddings,
    )
    theirs = MambaLMHeadModel(config, device=parameter.device, dtype=parameter.dtype)
    theirs.load_state_dict(model.state_dict())
    return theirs
