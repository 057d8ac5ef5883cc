"""``statescan info``: what a model is and what it costs, from a preset's name or a model's folder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from statescan.cli.terminal import command, emit_json, print_rows

__all__ = ["describe", "info"]


@command
def info(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A preset's name (tiny, 130m, ...) or a model folder.")],
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="FIELD=VALUE", help="Change a field of a preset.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Says what a model is made of and what it costs: parameters, FLOPs per token, bytes of state."""
    facts = describe(model, overrides or [])
    if as_json:
        emit_json(facts)
        return
    flops, state = facts["flops_per_token"], facts["state_bytes"]
    grows = facts["state_grows"]
    weights = ", ".join(f"{size / 1e6:,.1f} MB ({dtype})" for dtype, size in facts["weight_bytes"].items())
    print_rows(
        ("model", f"{facts['model']} ({facts['source']})"),
        ("parameters", f"{facts['parameters']:,}"),
        ("weights", weights),
        ("FLOPs per token", f"{flops['forward']:,} forward, {flops['training']:,} in training"),
        (
            "state of a sequence",
            f"{state['float32']:,} bytes (float32), {state['bfloat16']:,} (bfloat16), "
            + ("for each token of the context" if grows else "at any length"),
        ),
        *(
            ("" if number else "config", f"{name} = {value}")
            for number, (name, value) in enumerate(facts["config"].items())
        ),
    )


def describe(model: str, overrides: list[str]) -> dict[str, Any]:
    """The facts that `info` prints, as plain data; a folder's weights are looked at, not loaded."""
    import torch

    from statescan import models
    from statescan.errors import ConfigError

    folder = Path(model)
    if model not in models.PRESETS and (folder.exists() or len(folder.parts) > 1):
        from statescan.cli.models import model_folder, read_config

        if overrides:
            raise ConfigError("info: --set changes a preset, not a model that is saved; leave it out")
        folder = model_folder(folder)
        config, source = read_config(folder), str(folder)
    else:
        from statescan.train import apply_overrides

        config = models.preset(model)
        config = apply_overrides(config, [text.removeprefix("model.") for text in overrides])
        source = "preset" + (", changed" if overrides else "")
    flops = models.flops_per_token(config)
    parameters = models.parameter_count(config)
    return {
        "model": model,
        "source": source,
        "parameters": parameters,
        "flops_per_token": {"forward": flops.forward, "training": flops.training},
        "state_bytes": {
            "float32": models.state_bytes(config, context=1),
            "bfloat16": models.state_bytes(config, dtype=torch.bfloat16, context=1),
        },
        "state_grows": isinstance(config, models.TransformerConfig),
        "weight_bytes": {"float32": 4 * parameters, "bfloat16": 2 * parameters},
        "config": config.to_dict(),
    }
