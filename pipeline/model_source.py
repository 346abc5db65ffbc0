"""Where a model comes from: a checked local folder or a hub name; one line for each refusal."""

from __future__ import annotations

import json
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError
from safetensors import SafetensorError, safe_open

from kvsmith.errors import explain
from kvsmith.pipeline.config import input_path

# What reading somebody else's files and code may raise.
LOADING = (OSError, ValueError, TypeError, KeyError, ImportError, RuntimeError, SafetensorError)
# quant_method of a checkpoint -> packages that transformers reads it with
PACKAGES = {
    "gptq": ("gptqmodel", "optimum"),
    "awq": ("gptqmodel",),
    "bitsandbytes": ("bitsandbytes",),
    "compressed-tensors": ("compressed_tensors",),
}


def find_source(path: str, weights: bool = True) -> str:
    """A checked local folder, or the hub name.

    Args:
        path: folder or hub name.
        weights: whether the folder must hold whole weights.

    Raises:
        FileNotFoundError: no such folder, or a file is missing in it.
        ValueError: a file of weights is damaged.
    """
    folder = input_path(path)
    if folder.is_dir():
        if weights:
            _check_weights(folder)
        return str(folder)
    owner, _, name = path.partition("/")
    if not name or "/" in name or not owner.strip("."):
        remedy = "Give a folder with config.json and model.safetensors, or a hub name owner/name."
        expected = "an existing folder or a hub name"
        raise FileNotFoundError(explain("model.path", "value", expected, repr(path), remedy))
    return path


def refusal(path: str, what: str, error: BaseException, revision: str | None = None) -> ValueError:
    """Why `what` of a model could not be loaded, and what to do about it, in one sentence.

    Args:
        path: folder or hub name.
        what: model, configuration or tokenizer.
        error: what was raised.
        revision: that was asked for.
    """
    got = f"{path!r}: {first_line(error)}"
    return ValueError(explain("model.path", what, "loadable", got, _remedy(path, error, revision)))


def _remedy(path: str, error: BaseException, revision: str | None) -> str:
    causes, text = list(_causes(error)), str(error)
    local = input_path(path).is_dir()
    if any(isinstance(e, GatedRepoError) for e in causes) or "gated repo" in text:
        return f"Accept its terms at https://huggingface.co/{path}, then set HF_TOKEN."
    if any(isinstance(e, RepositoryNotFoundError) for e in causes):
        return "Check the name; a private model needs HF_TOKEN."
    if any(isinstance(e, RevisionNotFoundError) for e in causes):
        return f"Check model.revision={revision}."
    if "trust_remote_code" in text or "custom code" in text:
        return "Read the code that comes with it, then set model.trust_remote_code=true."
    if any(type(e).__name__ == "OutOfMemoryError" for e in causes):
        return "Set model.device_map=auto or model.weight_bits=4."
    if not local and any(isinstance(e, OSError) for e in causes):
        at = f" --revision {revision}" if revision else ""
        return (
            f"Where there is a network run `hf download {path}{at}` (kept under HF_HOME; a gated "
            "model needs HF_TOKEN), or give model.path=FOLDER."
        )
    return ""


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def first_line(error: BaseException) -> str:
    """The first line of another library's message."""
    text = str(error).strip()
    return text.splitlines()[0].rstrip(".") if text else type(error).__name__


def need_packages(where: str, names: tuple[str, ...], purpose: str, otherwise: str = "") -> None:
    """Refuse what needs a package that is not installed.

    Args:
        where: configuration path.
        names: import names.
        purpose: what they are for.
        otherwise: what to do without.

    Raises:
        ValueError: one is missing; says how to install it.
    """
    missing = [name for name in names if find_spec(name) is None]
    if missing:
        packages = " ".join(name.replace("_", "-") for name in missing)
        remedy = f"Run `pip install {packages}`{f', or {otherwise}' if otherwise else ''}."
        what = f"package {packages}"
        raise ValueError(explain(where, what, f"installed for {purpose}", "nothing", remedy))


def _check_weights(folder: Path) -> None:
    """Refuse a folder whose safetensors are missing or cut short, by the name of the file."""
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(explain(str(folder), "config.json", "present", "nothing"))
    index = folder / "model.safetensors.index.json"
    names = {"model.safetensors"}
    if index.is_file():
        try:
            names = set(json.loads(index.read_text("utf-8"))["weight_map"].values())
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            got = first_line(error)
            raise ValueError(explain(str(index), "file", "an index of shards", got)) from error
    for name in sorted(names):
        path = folder / name
        if not path.is_file():
            raise FileNotFoundError(explain(str(path), "weights", "present", "nothing"))
        try:
            with safe_open(path, framework="pt"):
                pass
        except (SafetensorError, OSError) as error:
            remedy, got = "Copy or download the file again.", f"({first_line(error)})"
            raise ValueError(
                explain(str(path), "file", "whole safetensors", got, remedy)
            ) from error
