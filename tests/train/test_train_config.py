import json

import pytest

from statescan.errors import ConfigError, StatescanError
from statescan.models import MambaConfig
from statescan.train import DataConfig, RunConfig, TrainConfig, apply_overrides

RUN = RunConfig(MambaConfig(d_model=16, n_layer=2, vocab_size=256), DataConfig(paths=("a.txt",)))


@pytest.mark.parametrize(
    ("override", "read", "value"),
    [
        ("train.steps=200", lambda run: run.train.steps, 200),
        ("train.steps=1e3", lambda run: run.train.steps, 1000),
        ("train.steps=1_000", lambda run: run.train.steps, 1000),
        ("train.lr=3", lambda run: run.train.lr, 3.0),
        (" train.lr = 3e-4 ", lambda run: run.train.lr, 3e-4),
        ("train.betas=0.8,0.9", lambda run: run.train.betas, (0.8, 0.9)),
        ("train.precision=bf16", lambda run: run.train.precision, "bf16"),
        ("train.devices=auto", lambda run: run.train.devices, "auto"),
        ("train.devices=2", lambda run: run.train.devices, 2),
        ("train.compile=true", lambda run: run.train.compile, True),
        ("train.capture=false", lambda run: run.train.capture, False),
        ("train.capture=true", lambda run: run.train.capture, True),
        ("train.capture=auto", lambda run: run.train.capture, "auto"),
        ("train.recompute=none", lambda run: run.train.recompute, "none"),
        ("data.cache=none", lambda run: run.data.cache, None),
        ("data.cache=folder=x", lambda run: run.data.cache, "folder=x"),
        ("data.paths=a.txt,b/*.txt", lambda run: run.data.paths, ("a.txt", "b/*.txt")),
        ("data.valid_paths=", lambda run: run.data.valid_paths, ()),
        ("model.dt_rank=4", lambda run: run.model.dt_rank, 4),
        ("model.dt_rank=auto", lambda run: run.model.dt_rank, "auto"),
        ("model.bias=yes", lambda run: run.model.bias, True),
    ],
)
def test_overrides_take_the_field_s_type(override, read, value):
    got = read(RUN.apply_overrides([override]))
    assert got == value
    assert type(got) is type(value)


def test_later_overrides_win_and_the_rest_stays():
    run = RUN.apply_overrides(["train.steps=5", "model.d_state=8", "train.steps=7"])
    assert (run.train.steps, run.model.d_state) == (7, 8)
    assert run.data == RUN.data
    assert run.train == TrainConfig(steps=7)
    assert apply_overrides(TrainConfig(), ["lr=1"]).lr == 1.0


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.step=5", "wanted a known field, got 'train.step'; the nearest is 'train.steps'"),
        ("steps=5", "got 'steps'; the nearest is 'train.steps'"),
        ("model.lr=5", "got 'model.lr'; the nearest is 'train.lr'"),
        ("train.lr.peak=5", "got 'train.lr.peak'; the nearest is"),
        ("model.d_stat=5", "the nearest is 'model.d_state'"),
        ("train=5", "train has fields of its own; set one of them, e.g. train.steps"),
        ("train.steps", "wanted field=value, got 'train.steps'"),
        ("train.steps=many", "train.steps: wanted int, got 'many'"),
        ("train.steps=1.5", "train.steps: wanted int, got '1.5'"),
        ("train.steps=inf", "train.steps: wanted int, got 'inf'"),
        ("train.steps=0", "train.steps: wanted >= 1, got 0"),
        ("train.lr=nan", "train.lr: wanted float, got 'nan'"),
        ("train.lr=-1", "train.lr: wanted > 0"),
        ("train.betas=0.9", "train.betas: wanted float,float, got '0.9'"),
        ("train.betas=0.9,1", r"train.betas: wanted two numbers in \[0, 1\)"),
        ("train.precision=fp16", r"train.precision: wanted float32 \| bf16, got 'fp16'"),
        ("train.devices=all", r"train.devices: wanted int \| auto, got 'all'"),
        ("train.compile=maybe", "train.compile: wanted bool, got 'maybe'"),
        ("train.capture=often", r"train.capture: wanted bool \| auto, got 'often'"),
        ("train.accumulate=3", "train.batch_size: wanted a multiple of accumulate, got 8"),
        ("data.valid_fraction=1", r"data.valid_fraction: wanted in \[0, 1\), got 1.0"),
        ("model.d_state=0", "d_state must be an integer >= 1"),
    ],
)
def test_bad_overrides_are_one_clear_line(override, message):
    with pytest.raises(ConfigError, match=message) as raised:
        RUN.apply_overrides([override])
    assert "\n" not in str(raised.value)


def test_json_there_and_back(tmp_path):
    run = RUN.apply_overrides(["train.betas=0.8,0.9", "data.paths=a,b", "train.devices=auto", "train.lr=0.1"])
    assert RunConfig.from_dict(run.to_dict()) == run
    (tmp_path / "config.json").write_text(run.to_json())
    assert RunConfig.from_json(tmp_path / "config.json") == run
    (tmp_path / "run.json").write_text(json.dumps({"config": run.to_dict(), "status": "finished"}))
    assert RunConfig.from_json(tmp_path / "run.json") == run


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda values: values["train"].update(stepz=1), "got 'train.stepz'; the nearest is 'train.steps'"),
        (lambda values: values["train"].update(steps="many"), "train.steps: wanted int, got 'many'"),
        (lambda values: values["train"].update(steps=True), "train.steps: wanted int, got True"),
        (lambda values: values["train"].update(betas=[0.9]), "train.betas: wanted float,float"),
        (lambda values: values.update(train=3), "train: wanted an object, got int"),
        (lambda values: values["model"].pop("d_model"), "d_model"),
    ],
)
def test_bad_json_is_named(tmp_path, change, message):
    values = RUN.to_dict()
    change(values)
    (tmp_path / "run.json").write_text(json.dumps(values))
    with pytest.raises(StatescanError, match=message):
        RunConfig.from_json(tmp_path / "run.json")


def test_unreadable_json_is_named(tmp_path):
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(ConfigError, match="can't be read as JSON"):
        RunConfig.from_json(tmp_path / "run.json")
    with pytest.raises(ConfigError, match="can't be read as JSON"):
        RunConfig.from_json(tmp_path / "none.json")
