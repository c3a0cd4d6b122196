"""Draws front.svg: a model, a policy, and what comes out of them. `python docs/images/draw.py`; the texts are real ones.

The emitted lines are those of `shardcomp inspect tiny --tensor 2 --listing`, which a test compares.
"""

from __future__ import annotations

import html
from pathlib import Path

MODEL = """# LlamaDecoderLayer.forward
residual = hidden_states
hidden_states = self.post_attention_layernorm(hidden_states)
hidden_states = self.mlp(hidden_states)
hidden_states = residual + hidden_states
# LlamaMLP.forward
down_proj = self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))"""

POLICY = """[weights]
"model.embed_tokens"                    = "vocab"
"model.layers.*.self_attn.{q,k,v}_proj" = "colwise"
"model.layers.*.self_attn.o_proj"       = "rowwise"
"model.layers.*.mlp.{gate,up}_proj"     = "colwise"
"model.layers.*.mlp.down_proj"          = "rowwise"
"lm_head"                               = "vocab\""""

NORM = "post_attention_layernorm"
EMITTED = f"""{NORM}_gathered: bf16[b, s, 128] = allgather_reducescatter({NORM}, dim=1, axis=self.tp)
{NORM}_gathered = self.fan_out({NORM}_gathered)
gate_proj: bf16[b, s, 352/tp] = linear({NORM}_gathered, w.mlp.gate_proj.weight)
up_proj: bf16[b, s, 352/tp] = linear({NORM}_gathered, w.mlp.up_proj.weight)
swiglu_1: bf16[b, s, 352/tp] = swiglu(gate_proj, up_proj, round_first=True)
down_proj: bf16[b, s, 128] @ partial("tp") = linear(swiglu_1, w.mlp.down_proj.weight)
down_proj_scattered: bf16[b, s/tp, 128] = reducescatter_allgather(down_proj, dim=1, axis=self.tp)
add_1: bf16[b, s/tp, 128] = getitem_3 + down_proj_scattered"""

STRONG = {"allgather_reducescatter": "#c2410c", "reducescatter_allgather": "#c2410c", '@ partial("tp")': "#c2410c"}
STRONG |= {
    "swiglu(": "#15803d",
    "colwise": "#1d4ed8",
    "rowwise": "#1d4ed8",
    "vocab": "#1d4ed8",
    "352/tp": "#1d4ed8",
    "s/tp": "#1d4ed8",
}

WIDTH, MARGIN, LINE = 1000, 20, 18


def text(
    x: int, y: int, content: str, size: float = 12, weight: str = "normal", fill: str = "#1f2937", mono: bool = True
) -> str:
    family = "ui-monospace, Menlo, Consolas, 'DejaVu Sans Mono', monospace" if mono else "system-ui, 'DejaVu Sans', sans-serif"
    shown = html.escape(content, quote=False)
    for word, colour in STRONG.items() if mono else ():
        plain = html.escape(word, quote=False)
        shown = shown.replace(plain, f'<tspan fill="{colour}" font-weight="bold">{plain}</tspan>')
    return (
        f'<text x="{x}" y="{y}" font-family="{family}" font-size="{size}" font-weight="{weight}" fill="{fill}" '
        f'xml:space="preserve">{shown}</text>'
    )


def box(x: int, y: int, width: int, title: str, content: str, size: float) -> tuple[str, int]:
    """A titled box of code; its markup and its height."""
    lines = content.splitlines()
    height = 34 + LINE * len(lines) + 10
    parts = [f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="8" fill="#ffffff" stroke="#cbd5e1"/>']
    parts.append(text(x + 14, y + 22, title, 13, "bold", "#475569", mono=False))
    parts += [text(x + 14, y + 34 + LINE * i + 13, line, size) for i, line in enumerate(lines)]
    return "\n".join(parts), height


def arrow(x: int, top: int, bottom: int) -> str:
    return (
        f'<path d="M {x} {top} L {x} {bottom - 7}" stroke="#64748b" stroke-width="2"/>'
        f'<path d="M {x - 6} {bottom - 9} L {x} {bottom} L {x + 6} {bottom - 9} Z" fill="#64748b"/>'
    )


def picture() -> str:
    left = 562
    model, height = box(MARGIN, MARGIN, left, "The model, as transformers has it", MODEL, 11.5)
    right = MARGIN + left + 16
    policy, _ = box(right, MARGIN, WIDTH - MARGIN - right, "The policy: seven lines", POLICY, 11)
    below = MARGIN + height
    start = below + 46
    wide = WIDTH - 2 * MARGIN
    emitted, tall = box(MARGIN, start, wide, "What each of two ranks runs: eight lines of the layer (MLP)", EMITTED, 11.5)
    total = start + tall + MARGIN
    label = text(WIDTH // 2 - 62, below + 28, "shardcomp.shard", 13, "bold", "#475569")
    arrows = arrow(MARGIN + left // 2, below + 6, start - 6) + arrow(
        right + (WIDTH - MARGIN - right) // 2, below + 6, start - 6
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {total}" width="{WIDTH}" height="{total}" role="img">\n'
        f'<rect width="{WIDTH}" height="{total}" rx="10" fill="#f1f5f9"/>\n{model}\n{policy}\n{label}{arrows}\n{emitted}\n'
        "</svg>\n"
    )


if __name__ == "__main__":
    Path(__file__).with_name("front.svg").write_text(picture())
