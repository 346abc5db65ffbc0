"""Eviction and LESS from their formulas, one head and one query at a time, in float64.

A head keeps a list of tokens. Each step brings `chunk` queries with their own tokens; they attend
to what is kept and to the step's tokens before them. Then blocks of the oldest recent tokens
compete with the kept middle, as the runtime's windows say, and losers go into the state for good.
"""

from dataclasses import dataclass, field

import torch


@dataclass
class Head:
    """What one KV head holds: token indices, their scores, and what was folded."""

    sinks: list = field(default_factory=list)
    middle: list = field(default_factory=list)
    recent: list = field(default_factory=list)
    folded: list = field(default_factory=list)
    score: dict = field(default_factory=dict)


def simulate(q, k, v, policy, sinks, room, slots, block, steps, scale, features=None):
    """Attention under eviction.

    Args:
        q: [Hq, T, D]; k, v: [H, T, D] float64.
        policy: "lambda", "h2o" or "tova", with attributes in a dict: kind, sinks, protected,
            and for h2o aging.
        sinks, room, slots, block: windows in tokens.
        steps: sizes of the steps.
        features: (phi, psi), query head or KV head and x [D] -> [R] positive; None for no state.

    Returns:
        out [Hq, T, D] and the heads at the end.
    """
    H, T, _ = k.shape
    G = q.shape[0] // H
    heads, out, done = [Head() for _ in range(H)], torch.zeros_like(q), 0
    for size in steps:
        new = list(range(done, done + size))
        mass = [{} for _ in range(H)]
        for h, head in enumerate(heads):
            for t in new:
                seen = head.sinks + head.middle + head.recent + list(range(done, t + 1))
                for g in range(G):
                    e = torch.exp(q[h * G + g, t] @ k[h, seen].T * scale)
                    top, bottom = e @ v[h, seen], e.sum()
                    if policy["kind"] == "h2o" or (policy["kind"] == "tova" and t == new[-1]):
                        for i, p in zip(seen, (e / bottom).tolist(), strict=True):
                            mass[h][i] = mass[h].get(i, 0.0) + p
                    if features is not None and head.folded:
                        phi, psi = features
                        f = phi(h * G + g, q[h * G + g, t])
                        w = torch.stack([psi(h, k[h, i]) for i in head.folded]) @ f
                        top, bottom = top + w @ v[h, head.folded], bottom + w.sum()
                    out[h * G + g, t] = top / bottom
        done += size
        _score(heads, mass, policy["kind"])
        for head in heads:
            _settle(head, new, done, policy, sinks, room, slots, block)
    return out, heads


def _score(heads, mass, kind):
    if kind == "tova":
        total = {}
        # Heads of a layer agree on TOVA's tokens, so places agree too.
        for m in mass:
            for i, p in m.items():
                total[i] = total.get(i, 0.0) + p
        for head in heads:
            head.score = dict(total)
    for head, m in zip(heads, mass, strict=True):
        if kind == "h2o":
            for i, p in m.items():
                head.score[i] = head.score.get(i, 0.0) + p


def _settle(head, new, length, policy, sinks, room, slots, block):
    for i in new:
        (head.sinks if i < sinks else head.recent).append(i)
    gone = max(len(head.recent) - room + block, 0) // block * block
    leaving, head.recent = head.recent[:gone], head.recent[gone:]

    def worth(i):
        if i < policy["sinks"] or length - 1 - i < policy["protected"]:
            return float("inf")
        if policy["kind"] == "lambda":
            return i
        return head.score[i] / (length - i) ** policy.get("aging", 0.0)

    pool = head.middle + leaving
    best = sorted(pool, key=lambda i: (-worth(i), pool.index(i)))[:slots]
    if gone:
        head.folded += [i for i in pool if i not in best]
        head.middle = [i for i in head.middle if i in best] + [i for i in leaving if i in best]
