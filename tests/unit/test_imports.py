"""Import discipline: nothing heavy before the command line is parsed; and the public names."""

import dataclasses
import os
import pydoc
import re
import subprocess
import sys

import pytest

import ddp_circles

HEAVY = {"torch", "sklearn", "numpy", "scipy", "wandb", "matplotlib", "safetensors"}


def imported_by(*arguments: str, code: int = 0) -> set[str]:
    """Top-level packages imported by `python *arguments`, which must exit with `code`."""
    done = subprocess.run([sys.executable, "-X", "importtime", *arguments], capture_output=True, text=True, timeout=60)
    assert done.returncode == code, done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("import time:")]
    assert len(lines) > 20
    return {line.rpartition("|")[2].strip().partition(".")[0] for line in lines}


@pytest.mark.parametrize(
    "arguments",
    [
        ("-m", "ddp_circles.train", "--help"),
        ("-m", "ddp_circles.predict", "--help"),
        ("-m", "ddp_circles.verify", "--help"),
        ("-m", "ddp_circles.records.wandb_copy", "--help"),
        ("-c", "import ddp_circles"),
        ("-c", "import ddp_circles; ddp_circles.Config()"),
        ("-c", "import ddp_circles.config, ddp_circles.job.ranks, ddp_circles.job.stop"),
    ],
    ids=" ".join,
)
def test_nothing_heavy_is_imported_early(arguments: tuple[str, ...]) -> None:
    imported = imported_by(*arguments)
    assert "ddp_circles" in imported
    assert not imported & HEAVY


def test_heavy_imports_are_detected() -> None:
    assert "numpy" in imported_by("-c", "import numpy")


def test_bad_flags_are_refused_before_torch_is_imported() -> None:
    assert not imported_by("-m", "ddp_circles.train", "--epochs", "-1", code=2) & HEAVY


def test_the_public_names() -> None:
    assert ddp_circles.__all__ == ["Config", "Dataset", "Result", "Split", "UserError", "fit"]
    assert all(hasattr(ddp_circles, name) for name in ddp_circles.__all__)
    assert not hasattr(ddp_circles, "Trainer")
    assert ddp_circles.fit.__module__ == "ddp_circles.run"
    assert set(ddp_circles.__all__) <= set(dir(ddp_circles))


def test_help_shows_what_there_is() -> None:
    shown = pydoc.plain(pydoc.render_doc(ddp_circles))
    for name in ddp_circles.__all__:
        assert re.search(rf"^    (class )?{name}\b", shown, re.MULTILINE), name
    for field in (*dataclasses.fields(ddp_circles.Config), *dataclasses.fields(ddp_circles.Result)):
        assert re.search(rf"^ +\|? +{field.name}: [A-Za-z].{{5}}", shown, re.MULTILINE), field.name


@pytest.mark.parametrize("module", ["train", "predict", "verify"])
def test_running_a_module_prints_no_warning(module: str) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-m", f"ddp_circles.{module}", "--help"],
        env=os.environ | {"COLUMNS": "100"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert f"ddp_circles.{module}" in done.stdout
