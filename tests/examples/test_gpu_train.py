"""`make gpu-train` without a GPU: parameters, memory, MFU, the choice of settings, every variant on a tiny shape, the file."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import arithmetic
import parts
import train_benchmark
import variants
from arithmetic import MEMORY, SHAPES, Setting
from shardcomp import presets

Capture = pytest.CaptureFixture[str]
TINY, CPU = SHAPES["tiny"], torch.device("cpu")


@pytest.fixture
def alone() -> Iterator[None]:
    """No process group is left behind."""
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


@pytest.mark.parametrize("name", SHAPES)
def test_parameters_are_those_of_the_model(name: str) -> None:
    shape = SHAPES[name]
    model = presets.build(shape.config())
    assert sum(p.numel() for p in model.parameters()) == shape.parameters
    assert shape.multiplied == sum(p.numel() for n, p in model.named_parameters() if shape.tied or "embed_tokens" not in n)


def test_mfu_is_what_one_computes_by_hand() -> None:
    # LLaMA-2-7B: 6,738,415,616 parameters less 32000 × 4096 = 6,607,343,616. Per token at 4096:
    # 6 × 6,607,343,616 + 12 × 32 × 4096 × 4096 = 46,086,512,640 and with half the attention 42,865,287,168.
    shape = SHAPES["7b"]
    assert shape.parameters == 6_738_415_616 and shape.multiplied == 6_607_343_616
    assert shape.flops_per_token(causal=False) == 46_086_512_640
    assert shape.flops_per_token(causal=True) == 42_865_287_168
    found = arithmetic.mfu(shape, 10_000, "NVIDIA H200")
    assert found["full_attention"] == pytest.approx(0.465991, abs=1e-6)  # 460.865 of 989 TFLOPS
    assert found["causal"] == pytest.approx(0.433421, abs=1e-6)
    assert arithmetic.mfu(shape, 10_000, "something else") == {"full_attention": None, "causal": None}
    assert SHAPES["1b"].multiplied == SHAPES["1b"].parameters  # its embedding is its head


def test_states_are_counted_by_hand() -> None:
    shape = SHAPES["7b"]
    for variant, gathered, bytes_each in (
        ("shardcomp", True, 18),
        ("shardcomp", False, 16),
        ("fsdp2", False, 16),
        ("hf-eager", True, 16),
    ):
        found = arithmetic.memory(variant, shape, Setting(1, "none", gathered))
        assert found["states"] == bytes_each * shape.parameters
        assert found["total"] == pytest.approx(sum(size for name, size in found.items() if name != "total"))
    # 4096 tokens, 32 layers, of 20·4096 + 4·4096 + 8·11008 and twice 4 or 8 bytes beside: 24.5 GB.
    eager = arithmetic.memory("hf-eager", shape, Setting(1, "none"))["activations"]
    assert eager == 4096 * 32 * (24 * 4096 + 8 * 11008 + 4 * 32)
    full = arithmetic.memory("hf-eager", shape, Setting(1, "full"))["activations"]
    assert 4096 * 32 * 2 * 4096 < full < eager / 8


def test_the_choice_takes_no_recompute_and_large_micro_batches_first() -> None:
    order = arithmetic.settings("shardcomp", SHAPES["7b"])
    assert (
        order[0] == Setting(4, "none", True) and order[1] == Setting(4, "none", False) and order[2] == Setting(2, "none", True)
    )
    assert {each.recompute for each in arithmetic.settings("hf-eager", SHAPES["7b"])} == {"none", "full"}
    for memory in MEMORY.values():
        for shape in (arithmetic.fitted(SHAPES[name], memory) for name in ("7b", "3b", "1b")):
            for variant in arithmetic.VARIANTS:
                chosen = arithmetic.candidates(variant, shape, memory)
                assert chosen and all(arithmetic.memory(variant, shape, each)["total"] <= memory for each in chosen)
                assert chosen[0].recompute == "none"
                skipped = order[: order.index(chosen[0])] if (variant, shape) == ("shardcomp", SHAPES["7b"]) else []
                assert all(arithmetic.memory(variant, shape, each)["total"] > memory for each in skipped)


def test_what_does_not_fit_as_a_whole_is_measured_in_part_and_that_is_said() -> None:
    whole = SHAPES["7b"]
    assert arithmetic.fitted(whole, MEMORY["H200"]) == whole
    part = arithmetic.fitted(whole, MEMORY["H100"])
    assert part.full == 32 and 8 < part.layers < 32
    more = replace(part, layers=part.layers + 1)
    assert not all(any(arithmetic._without_recompute(v, more, 0.95 * MEMORY["H100"])) for v in arithmetic.VARIANTS)
    [first, second] = train_benchmark.alternatives(whole, MEMORY["H100"])
    assert "108 to 121 GB" in first and f"{part.layers} of its 32 layers" in second and "54 GB" in second
    assert len(train_benchmark.alternatives(whole, MEMORY["H200"])) == 1
    with pytest.raises(ValueError, match="not one layer fits in 4 GB"):
        arithmetic.fitted(whole, 4e9)


def measured(variant: str, out: Path) -> dict[str, object]:
    train_benchmark.measure(variant, TINY, 80e9, "cpu", out)
    found: dict[str, object] = {}
    for each in parts.read(out):
        found |= each
    return found


KEYS = {
    "variant",
    "shape",
    "setting",
    "tokens_per_second",
    "mfu",
    "step",
    "peak_memory",
    "losses",
    "time",
    "tried",
    "attention",
}


@pytest.mark.long  # the dry run below starts the same code
def test_every_variant_trains_the_same_tiny_model(tmp_path: Path, alone: None) -> None:
    found = {name: measured(name, tmp_path / f"{name}.jsonl") for name in arithmetic.VARIANTS}
    ran = {name: each for name, each in found.items() if "failed" not in each}
    assert set(found) - set(ran) <= {"hf-liger"}, found
    for each in ran.values():
        assert each.keys() >= KEYS
        assert each["parameters"] == TINY.parameters
        assert {"matmul", "attention", "optimizer"} <= each["time"].keys()  # type: ignore[attr-defined]
        losses = each["losses"]
        assert losses == pytest.approx(ran["hf-eager"]["losses"], rel=1e-3)
        assert losses[-1] < losses[0] - 0.02  # type: ignore[index]


def test_a_setting_that_does_not_fit_is_told_and_the_next_is_tried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    timed = train_benchmark.timed

    def full(variant: str, shape: object, setting: Setting, device: object) -> object:
        if setting.micro_batch == 2:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GB")
        return timed(variant, shape, setting, device)  # type: ignore[arg-type]

    monkeypatch.setattr(train_benchmark, "timed", full)
    found = measured("hf-eager", tmp_path / "out.jsonl")
    assert found["setting"] == {"micro_batch": 1, "recompute": "none", "gathered": True}
    assert found["tried"][0]["why"].startswith("CUDA out of memory")  # type: ignore[index]


def test_kernels_are_told_apart_by_name() -> None:
    names = {
        "nvjet_tst_128x256_64x4_2x1_v_bz_TNT": "matmul",
        "sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n": "matmul",
        "void pytorch_flash::flash_fwd_kernel<Flash_fwd_kernel_traits<128>>": "attention",
        "cudnn_generated_fort_native_sdpa_sm90_flash_bprop": "attention",
        "void at::native::vectorized_layer_norm_kernel": "norms",
        "triton_red_fused__to_copy_add_mean_mul_pow_rsqrt_3": "norms",
        "void at::native::vectorized_elementwise_kernel<4, silu>": "elementwise",
        "ncclDevKernel_AllGather_RING_LL": "communication",
        "void at::native::chunk_cat_cuda_kernel<float, bf16>": "communication",
        "void cunn_SoftMaxForward<4, float>": "loss",
    }
    assert {name: variants.kind(name) for name in names} == names


def test_a_dry_run_tells_the_plan_and_runs_what_is_asked_for(capsys: Capture, tmp_path: Path) -> None:
    asked = ["--dry-run", "--variants", "hf-eager", "hf-liger", "--results", str(tmp_path)]
    assert train_benchmark.main(asked) == 0
    out = capsys.readouterr().out
    assert "7b hf-eager, 7b hf-liger, 1b hf-eager" in out and "H200, 151 GB" in out and "at most 70 s" in out
    assert "tiny hf-eager: done, loss 5.5" in out and "nothing was measured" in out and "tokens/s" not in out
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_one_message_says_so(capsys: Capture) -> None:
    assert train_benchmark.main([]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and "a GPU is needed" in err


def test_the_7b_comparison_comes_first_and_each_variant_has_its_own_limit(tmp_path: Path) -> None:
    planned = train_benchmark.planned(["7b", "1b", "3b"], arithmetic.VARIANTS, 1e11, "cuda", tmp_path)
    assert [each.name for each in planned[:6]] == [f"7b {name}" for name in arithmetic.VARIANTS]
    assert [each.name for each in planned[:2]] == ["7b hf-eager", "7b shardcomp"]
    assert all(each.seconds <= 100 for each in planned)


def test_the_file_is_written_after_every_variant_and_says_what_was_cut_off(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Capture
) -> None:
    """On a GPU that is not there: the processes are stand-ins on the CPU."""
    about = {**parts.about(), "device": "NVIDIA H200", "memory": MEMORY["H200"]}
    monkeypatch.setattr(parts, "need_gpu", lambda dry_run: None)
    monkeypatch.setattr(parts, "about", lambda: about)
    planned = train_benchmark.planned
    sizes: list[int] = []

    def on_cpu(shapes: object, variants: list[str], memory: float, device: str, folder: Path) -> list[parts.Part]:
        made = planned(["tiny"], variants, memory, "cpu", folder)
        return [made[0], replace(made[1], seconds=0.3), *made[2:]]

    save = parts.save

    def saved(path: Path, found: dict[str, list[object]]) -> None:
        sizes.append(len(found["variants"]))
        save(path, found)  # type: ignore[arg-type]

    monkeypatch.setattr(train_benchmark, "planned", on_cpu)
    monkeypatch.setattr(parts, "save", saved)
    assert train_benchmark.main(["--variants", "hf-eager", "shardcomp", "--results", str(tmp_path)]) == 1
    assert sizes == [1, 2]
    [path] = tmp_path.iterdir()
    assert path.name.endswith("-nvidia-h200-train.json")
    first, second = json.loads(path.read_text())["variants"]
    assert first.keys() >= KEYS and first["state"] == "done"
    assert second["state"] == "cut off" and "step" not in second
    table = capsys.readouterr().out.rpartition("commit")[2]
    assert "cut off" in table and "hf-eager" in table and "matmul" in table
