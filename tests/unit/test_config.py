"""The configuration: validation, precedence of flags over file over recipe, and the round trip through TOML."""

import dataclasses
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, Literal, get_origin

import pytest
import tomli_w
from hypothesis import given, settings
from hypothesis import strategies as st

from ddp_circles.config import FLAGS_SPOKEN, Config, in_arguments, read_toml, recipe
from ddp_circles.errors import UserError
from ddp_circles.job.faults import Fault
from ddp_circles.train import parse_command_line

FLAGS: list[tuple[str, Any, str, Any]] = [
    # flag, default, another value as written on the command line, and as held in the configuration
    ("--dataset", "circles", "moons", "moons"),
    ("--n-samples", 1000, "10", 10),
    ("--noise", 0.03, "0", 0.0),
    ("--factor", 0.8, "0.25", 0.25),
    ("--test-fraction", 0.2, "0.5", 0.5),
    ("--data-seed", 42, "0", 0),
    ("--hidden", (10, 10), "5 6 7", (5, 6, 7)),
    ("--activation", "relu", "none", "none"),
    ("--optimizer", "adam", "sgd", "sgd"),
    ("--lr", 0.01, "1e-3", 0.001),
    ("--epochs", 60, "3", 3),
    ("--batch-size", 64, "0", 0),
    ("--seed", 42, "4294967295", 2**32 - 1),
    ("--reduction", "exact", "fast", "fast"),
    ("--micro-batches", 8, "1", 1),
    ("--audit-steps", 0, "100", 100),
    ("--device", "auto", "cpu", "cpu"),
    ("--backend", "auto", "gloo", "gloo"),
    ("--run-dir", None, "some/where", Path("some/where")),
    ("--resume", "auto", "must", "must"),
    ("--checkpoint-seconds", 30.0, "0.5", 0.5),
    ("--checkpoint-steps", 0, "7", 7),
    ("--log-every", 10, "1", 1),
    ("--wandb", "auto", "disabled", "disabled"),
    ("--wandb-project", "ddp_circles", "another", "another"),
    ("--plots", True, "", True),
    ("--fault", None, "kill@1:20", "kill@1:20"),
    ("--threads", 1, "2", 2),
    ("--timeout", 300.0, "60", 60.0),
]

OUT_OF_RANGE: dict[str, list[Any]] = {
    "dataset": ["squares", ""],
    "n_samples": [1, 0, -5, 10**15],
    "noise": [-0.1, float("inf"), float("nan")],
    "factor": [-0.1, 1.0, 1.5, float("nan")],
    "test_fraction": [0.0, 1.0, -0.5, 0.9999, float("nan")],
    "data_seed": [-1, 2**32],
    "hidden": [(0,), (10, -1), (10**12,), (1,) * 1001],
    "activation": ["tanh"],
    "optimizer": ["lion"],
    "lr": [0.0, -0.1, float("inf"), float("nan")],
    "epochs": [0, -1],
    "batch_size": [-1],
    "seed": [-1, 2**32],
    "reduction": ["quick"],
    "micro_batches": [0, -1, 10**20],
    "audit_steps": [-1],
    "device": ["tpu"],
    "backend": ["mpi"],
    "resume": ["perhaps"],
    "checkpoint_seconds": [0.0, -1.0, float("inf"), float("nan")],
    "checkpoint_steps": [-1],
    "log_every": [0, -1],
    "wandb": ["sometimes"],
    "wandb_project": ["", "  "],
    "fault": ["", "bang@0:1", "kill@1", "kill@-1:2", "kill@1:x", "kill@1:2 ", "kill@1:2+", "flip@1", "flip@1+"],
    "threads": [0, -1, 10**10],
    "timeout": [0.0, -1.0, float("inf"), float("nan"), 1e14],
}
ILL_TYPED: dict[str, list[Any]] = {
    field.name: ["text", 1.5, True, [1]]
    if field.type is int
    else ["text", True, [1]]
    if field.type is float
    else [[1.5], ["a"], [True], 10, "10"]
    if field.name == "hidden"
    else ["true", 1]
    if field.type is bool
    else [7, True]
    for field in dataclasses.fields(Config)
}
IN_RANGE_ONLY = {"run_dir", "plots"}
"""Fields that accept every value of their type."""


def flag_of(field: str) -> str:
    return "--" + field.replace("_", "-")


def as_text(value: Any) -> list[str]:
    return [str(part) for part in value] if isinstance(value, tuple) else [str(value)]


def cases(table: dict[str, list[Any]]) -> list[Any]:
    return [pytest.param(field, value, id=f"{field}={value!r}") for field, values in table.items() for value in values]


@contextmanager
def command_line() -> Iterator[None]:
    """Speak flags, as the trainer's command line does."""
    token = FLAGS_SPOKEN.set(True)
    try:
        yield
    finally:
        FLAGS_SPOKEN.reset(token)


def refusal(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> str:
    """The error message for a bad command line, raised by us or by the parser."""
    with command_line(), pytest.raises((UserError, SystemExit)) as refused:
        parse_command_line(arguments)
    if isinstance(refused.value, UserError):
        return str(refused.value)
    assert isinstance(refused.value, SystemExit)
    assert refused.value.code == 2
    return capsys.readouterr().err


def test_the_tables_of_bad_values_cover_every_field() -> None:
    fields = {field.name for field in dataclasses.fields(Config)}
    assert set(OUT_OF_RANGE) == fields - IN_RANGE_ONLY
    assert set(ILL_TYPED) == fields


@pytest.mark.parametrize("field, value", cases(OUT_OF_RANGE))
def test_out_of_range_is_refused_by_name(field: str, value: Any) -> None:
    for spoken, name in ((nullcontext(), f"{field}="), (command_line(), flag_of(field))):
        with spoken, pytest.raises(UserError, match=rf"^{name} ") as refused:
            Config(**{field: value})
        assert ("--" in str(refused.value)) == name.startswith("--")


@pytest.mark.parametrize("field, value", cases(OUT_OF_RANGE))
def test_out_of_range_is_refused_on_the_command_line(
    field: str, value: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    assert flag_of(field) in refusal(capsys, [flag_of(field), *as_text(value)])


@pytest.mark.parametrize("field, value", cases(ILL_TYPED))
def test_ill_typed_is_refused_in_a_file(field: str, value: Any, tmp_path: Path) -> None:
    file = tmp_path / "config.toml"
    file.write_text(tomli_w.dumps({field: value}))
    for spoken, name in ((nullcontext(), f"{field}="), (command_line(), flag_of(field))):
        with spoken, pytest.raises(UserError, match=rf"--config .*: {name} "):
            read_toml(file)


@pytest.mark.parametrize(
    "flags, arguments",
    [
        ("--reduction exact cannot, --reduction fast.", 'reduction="exact" cannot, reduction="fast".'),
        ("--resume must: no; --resume must be one of", 'resume="must": no; resume= must be one of'),
        ("--run-dir /a/b c is; another --run-dir, or", "run_dir=/a/b c is; another run_dir=, or"),
        ("--epochs 3: more --epochs to; --lr 0.01)", "epochs=3: more epochs= to; lr=0.01)"),
        ("--wandb-project (a there) --wandb offline", 'wandb_project= (a there) wandb="offline"'),
        ("--rdzv-id, --nproc_per_node=2, --epochs-done", "--rdzv-id, --nproc_per_node=2, --epochs-done"),
    ],
)
def test_flags_become_arguments(flags: str, arguments: str) -> None:
    assert in_arguments(flags) == in_arguments(arguments) == arguments
    with command_line():
        assert in_arguments(flags) == flags


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(Config) if field.type in (int, float)])
def test_words_for_numbers_are_refused_on_the_command_line(field: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert flag_of(field) in refusal(capsys, [flag_of(field), "many"])


@pytest.mark.parametrize("samples, fraction", [(2, 0.75), (10, 0.95)])
def test_both_parts_of_the_split_need_a_sample(samples: int, fraction: float) -> None:
    with pytest.raises(UserError, match="test_fraction="):
        Config(n_samples=samples, test_fraction=fraction)


def test_unknown_recipe_is_refused_by_name(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError, match=r"--recipe must be one of circles, .*model_4, got 'model_2'"):
        recipe("model_2")
    assert "--recipe" in refusal(capsys, ["--recipe", "model_2"])
    assert "--recipe" in refusal(capsys, ["--recipe"])


def test_unknown_flag_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert "--learning-rate" in refusal(capsys, ["--learning-rate", "1"])


@pytest.mark.parametrize("key", ["learning_rate", "recipe", "config"])
def test_unknown_key_is_refused_by_name(key: str, tmp_path: Path) -> None:
    file = tmp_path / "config.toml"
    file.write_text(f'{key} = "circles"\n')
    with pytest.raises(UserError, match=f"--config .*unknown key '{key}'"):
        read_toml(file)


@pytest.mark.parametrize("content", [None, b"lr = ", b"\xff\xfe", b"lr = 1\nlr = 2\n", b"lr = " + b"[" * 60000])
def test_unreadable_file_is_refused(content: bytes | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "config.toml"
    if content is not None:
        file.write_bytes(content)
    assert f"--config {file}" in refusal(capsys, ["--config", str(file)])


def test_a_folder_is_no_configuration(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "pipe", Path("/dev/zero")):
        with pytest.raises(UserError, match=rf"^--config {path} cannot be read: it is a"):
            read_toml(path)


def test_a_script_that_does_not_catch_it_ends_as_a_command_line() -> None:
    script = "import ddp_circles; ddp_circles.Config(lr=-1)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: lr= must be a finite number above 0, got -1\n"


def test_other_errors_of_a_script_are_shown_as_ever(capsys: pytest.CaptureFixture[str]) -> None:
    seen: list[BaseException] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "excepthook", lambda _, error, __: seen.append(error))
        for _ in range(2):
            with pytest.raises(UserError):
                Config(lr=-1)
        sys.excepthook(ValueError, other := ValueError("other"), None)
        assert seen == [other]
        assert capsys.readouterr() == ("", "")
        patch.setattr(sys, "ps1", ">>> ", raising=False)  # a session at a prompt goes on
        sys.excepthook(UserError, UserError("mistake"), None)
        assert (seen, capsys.readouterr().err) == ([other], "error: mistake\n")
    assert UserError("mistake")._render_traceback_() == ["error: mistake"]  # for IPython, which has no hook


def test_flags_win_over_the_file_and_the_file_over_the_recipe(tmp_path: Path) -> None:
    file = tmp_path / "config.toml"
    file.write_text("lr = 0.5\nepochs = 7\nhidden = [3]\nrun_dir = 'from/file'\n")
    config = parse_command_line(["--recipe", "model_1", f"--config={file}", "--epochs", "9", "--no-plots"])
    assert (config.lr, config.hidden, config.run_dir) == (0.5, (3,), Path("from/file"))  # the file's
    assert (config.epochs, config.plots) == (9, False)  # the flags'
    assert (config.activation, config.optimizer, config.batch_size, config.log_every) == ("none", "sgd", 0, 100)


def test_a_flag_may_repeat_the_general_default_against_the_recipe() -> None:
    assert parse_command_line(["--recipe", "model_1", "--epochs", "60"]).epochs == 60


def test_the_command_line_is_frozen(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as leaving:
        parse_command_line(["--help"])
    assert leaving.value.code == 0
    listed = set(re.findall(r"^[│ ]*(?:-h, )?(--[a-z][a-z-]+)", capsys.readouterr().out, flags=re.MULTILINE))
    assert listed == {flag for flag, *_ in FLAGS} | {"--help", "--recipe", "--config"}
    defaults = dataclasses.asdict(parse_command_line([]))
    assert {flag_of(field): value for field, value in defaults.items()} == {flag: value for flag, value, *_ in FLAGS}


@pytest.mark.parametrize("flag, default, text, value", FLAGS, ids=[flag for flag, *_ in FLAGS])
def test_each_flag_sets_its_field(flag: str, default: Any, text: str, value: Any) -> None:
    set_to = getattr(parse_command_line([flag, *text.split()]), flag[2:].replace("-", "_"))
    assert (set_to, type(set_to)) == (value, type(value))


def test_plots_can_be_turned_off() -> None:
    assert not parse_command_line(["--no-plots"]).plots


@pytest.mark.parametrize(
    "name, expected",
    [
        ("circles", {}),
        ("model_0", {"hidden": (5,), "activation": "none", "epochs": 100, "log_every": 10}),
        ("model_1", {"hidden": (10, 10), "activation": "none", "epochs": 1000, "log_every": 100}),
        ("model_3", {"hidden": (10, 10), "activation": "relu", "epochs": 1000, "log_every": 100}),
        (
            "model_4",
            {"dataset": "blobs", "noise": 1.5, "hidden": (8, 8), "activation": "none", "epochs": 100, "log_every": 10},
        ),
    ],
)
def test_recipes_are_the_tutorials(name: str, expected: dict[str, Any]) -> None:
    tutorial = {} if name == "circles" else {"optimizer": "sgd", "lr": 0.1, "batch_size": 0}
    defaults = {flag[2:].replace("-", "_"): default for flag, default, *_ in FLAGS}
    assert dataclasses.asdict(recipe(name)) == defaults | tutorial | expected
    assert parse_command_line(["--recipe", name]) == recipe(name)


def values_of(field: "dataclasses.Field[Any]") -> st.SearchStrategy[Any]:
    """Valid values for one field."""
    if get_origin(field.type) is Literal:
        return st.sampled_from(field.type.__args__)  # type: ignore[union-attr]
    positive = st.floats(1e-6, 1e6)
    return {
        "n_samples": st.integers(10, 10**6),
        "noise": st.floats(0, 10),
        "factor": st.floats(0, 0.99),
        "test_fraction": st.floats(0.1, 0.8),
        "data_seed": st.integers(0, 2**32 - 1),
        "seed": st.integers(0, 2**32 - 1),
        "hidden": st.lists(st.integers(1, 99), max_size=4).map(tuple),
        "lr": positive,
        "timeout": positive,
        "checkpoint_seconds": positive,
        "epochs": st.integers(1, 10**6),
        "batch_size": st.integers(1, 10**6),
        "checkpoint_steps": st.integers(1, 10**6),
        "micro_batches": st.integers(1, 64),
        "audit_steps": st.integers(0, 10**6),
        "log_every": st.integers(1, 10**6),
        "threads": st.integers(1, 64),
        "wandb_project": st.text(st.characters(exclude_categories=["Cs"]), min_size=1).filter(str.strip),
        "plots": st.booleans(),
        "run_dir": st.none() | st.just(Path("some/where")),
        "fault": st.none() | st.sampled_from(["nan@1:20", "flip@0:3+"]),
    }[field.name]


CONFIGS = (
    st.fixed_dictionaries({field.name: values_of(field) for field in dataclasses.fields(Config)})
    .filter(lambda values: not (values["audit_steps"] and values["reduction"] == "fast"))
    .map(lambda values: Config(**values))
)


@settings(deadline=None)
@given(config=CONFIGS)
def test_a_file_restores_the_run_but_not_its_launch(config: Config, tmp_path_factory: pytest.TempPathFactory) -> None:
    text = config.to_toml()
    fields = {field.name for field in dataclasses.fields(Config)}
    assert set(tomllib.loads(text)) == fields - {"run_dir", "resume", "fault"}
    file = tmp_path_factory.getbasetemp() / "round_trip.toml"
    file.write_bytes(text.encode())
    same_run = dataclasses.replace(config, run_dir=None, resume="auto", fault=None)
    assert recipe("circles", **read_toml(file)) == same_run


def test_a_written_file_is_read_by_the_command_line(tmp_path: Path) -> None:
    written = recipe("model_4", epochs=3, wandb="disabled", hidden=())
    file = tmp_path / "config.toml"
    file.write_text(written.to_toml())
    assert parse_command_line(["--config", str(file)]) == written


def test_a_configuration_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config().lr = 1.0  # type: ignore[misc]


def test_a_fault_is_read_in_full() -> None:
    assert Fault.parse("stall@12:345") == Fault("stall", 12, 345)


def test_the_run_directory_is_a_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/somebody")
    assert Config(run_dir="~/runs").run_dir == Path("/home/somebody/runs")  # type: ignore[arg-type]
    assert recipe("circles", run_dir="runs/s3").run_dir == Path("runs/s3")
    assert recipe("circles", run_dir=".").run_dir == Path()
    for wrong in ("", "s3://bucket/run", "gs:/x", "~nobody-of-this-name/x"):
        with pytest.raises(UserError, match="run_dir="):
            Config(run_dir=wrong)  # type: ignore[arg-type]
        with pytest.raises((UserError, SystemExit), match=r"2|--run-dir"):
            parse_command_line([f"--run-dir={wrong}"])
