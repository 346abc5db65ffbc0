"""`python -m kvsmith inspect BUNDLE` says what a bundle is, `verify BUNDLE` whether it is whole."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from kvsmith.bundle import Bundle, BundleError, base_model
from kvsmith.bundle.card import describe, sizes
from kvsmith.strict import to_dict


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        arguments: words after `python -m kvsmith`; None takes those of the process.

    Returns:
        The exit code: 0, or 1 with one line on stderr for each bundle that is refused.
    """
    parser = argparse.ArgumentParser(prog="python -m kvsmith", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    inspect = commands.add_parser("inspect", help="say what a bundle is")
    inspect.add_argument("bundles", nargs=1, metavar="BUNDLE", help="folder, or hub name")
    verify = commands.add_parser("verify", help="say whether bundles are whole")
    verify.add_argument("bundles", nargs="+", metavar="BUNDLE", help="folders, or hub names")
    verify.add_argument("--model", help="folder or hub name of a model that they must fit")
    asked = parser.parse_args(arguments)
    code = 0
    for name in asked.bundles:
        try:
            bundle = Bundle.from_pretrained(name)
            if asked.command == "inspect":
                lines = [f"{a:<12} {b}" for a, b in facts(bundle)]
            else:
                lines = [_verified(bundle, name, asked.model)]
            sys.stdout.write("\n".join(lines) + "\n")
        except (BundleError, ValueError, OSError) as error:
            sys.stderr.write(f"error: {' '.join(str(error).split())}\n")
            code = 1
    return code


def facts(bundle: Bundle) -> list[tuple[str, str]]:
    """What a bundle is, as (word, sentence)."""
    m, codec = bundle.manifest, bundle.spec.codec
    base = m.base_model
    heads = sorted({(g.kv_heads, g.query_heads, g.k_dim, g.v_dim) for g in base.layers})
    shapes = "; ".join(f"{h} KV heads for {q}, keys of {k}, values of {v}" for h, q, k, v in heads)
    lines = [
        ("made by", f"{m.created_by}, format version {m.format_version}"),
        ("model", f"{base.id}{f' at {base.revision}' if base.revision else ''}"),
        ("layers", f"{len(base.layers)}, {len(base.geometry.owners)} own tokens; {shapes}"),
        ("keys", f"{describe(codec.k)}, {codec.key_domain}-RoPE"),
        ("values", describe(codec.v)),
        *(
            (
                f"layer {c.layer}",
                f"keys {describe(c.k)}; values {describe(c.v)}"
                + ("" if c.recent is None else f"; {c.recent} newest tokens dense"),
            )
            for c in codec.layers
        ),
        (
            "dense",
            f"{codec.sinks} first and {codec.recent} newest tokens, blocks of {codec.block_size}",
        ),
        ("eviction", _words(bundle.spec.eviction)),
    ]
    if bundle.spec.less is not None:
        lines.append(("less", _words(bundle.spec.less)))
    if (delta := m.delta) is not None:
        values = sum(w.numel() for w in bundle.weights.values())
        made = f"{len(bundle.weights)} weights of {values:,} values in {delta.dtype}"
        lines.append(("delta", f"{made}, beside those of {delta.id} ({delta.weights_hash[:16]})"))
    bits = ", ".join(f"{b:.3f} at {label}" for label, b in sizes(m).items())
    lines.append(("bits", f"{bits} tokens, everything counted"))
    c = m.calibration
    if c is not None:
        text = f"{c.samples} x {c.length} tokens of {c.dataset}, seed {c.seed}, {c.sensitivity}"
        lines.append(("calibration", text))
    lines += [("quality", f"{name} {value:.6g}") for name, value in sorted(m.quality.items())]
    lines += [
        ("file", f"{name}, {info.size:,} bytes, sha256 {info.sha256[:16]}...")
        for name, info in sorted(m.files.items())
    ]
    return lines


def _words(part: object) -> str:
    """A dataclass as its kind and its settings."""
    data = dict(to_dict(part))
    kind = str(data.pop("kind", ""))
    return " ".join([kind, *(f"{n}={v}" for n, v in data.items())]).strip()


def _verified(bundle: Bundle, name: str, model: str | None) -> str:
    """The line for a bundle that passed; refuses a model that it does not fit."""
    if model is not None:
        from kvsmith.hf import geometry
        from kvsmith.hf.shapes import find_config

        config = find_config(model)[1]
        text = config.get_text_config(decoder=True)
        found = base_model(text.to_dict(), geometry(config), model)
        base, delta = bundle.manifest.base_model, bundle.manifest.delta
        unshared = delta is not None and found.owner == base.unshared.owner
        (base.unshared if unshared else base).check(found, name)
    values = sum(t.numel() for t in bundle.parameters.values())
    fits = f", fits {model}" if model else ""
    tensors = f"{len(bundle.parameters)} tensors of {values:,} values"
    return f"{name}: whole, {len(bundle.manifest.files)} files, {tensors}{fits}"


if __name__ == "__main__":
    sys.exit(main())
