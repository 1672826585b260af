"""The table of the README: three figures, each beside the best that there is without us, in both languages."""

from __future__ import annotations

from itertools import chain

from .figure_rows import AVX512, Lines, Results, markdown

FRONT_PAGE = {
    "en": (
        ("", "ours", "the best baseline", "the usual one"),
        "inference: the demo's encoder, 3 of 6 layers, W8A8; a batch of 32 x 40",
        'training: a W8A8 step with `"kernel": "int8"`, plain fp32 = 1',
        "slow link of 1 Gbit/s: a ZeRO-2 step of a 23 M encoder on 2 nodes, 4 x 40 tokens each",
        ("torch bf16, all 6 layers", "torch fp32"),
        ("plain bf16 autocast, not quantized", "W8A8 fake quantization on floats"),
        ("{} times as fast", "1 (DeepSpeed in bf16)", "{} without a limit of speed"),
    ),
    "zh": (
        ("", "本项目", "最好的基线", "常见的基线"),
        "推理：演示中的编码器，6 层取 3 层，W8A8；一个 32 x 40 的批次",
        '训练：一步 W8A8，使用 `"kernel": "int8"`，普通 fp32 = 1',
        "1 Gbit/s 的慢速链路：2 个节点，23 M 编码器的一步 ZeRO-2，每个节点 4 x 40 个词元",
        ("torch bf16，全部 6 层", "torch fp32"),
        ("普通 bf16 autocast，未量化", "浮点上的 W8A8 伪量化"),
        ("{} 倍的速度", "1（DeepSpeed，bf16）", "不限速时 {} 倍"),
    ),
}


def front_page() -> Lines:
    return _front_page("en")


def front_page_zh() -> Lines:
    return _front_page("zh")


def _front_page(language: str) -> Lines:
    head, inference, training, link, models, steps, speeds = FRONT_PAGE[language]
    demo, step, reduction = Results("demo"), Results("step_overhead", AVX512), Results("reduction")
    (exported,) = demo.variants(", exported")
    milliseconds = demo.value(exported, "latency ms")
    slower = [demo.value(exported, figure) for figure in ("times faster than bf16", "times faster")]
    dense = demo.value("teacher", "bytes") / 1e6
    ratios = [
        step.value(variant, "ratio")
        for variant in ("W8A8 dynamic, int8 kernel", "plain DeepSpeed, bf16 autocast", "W8A8 dynamic")
    ]
    job = "step of minilm, stage 2, 2 nodes, {}: auto"
    faster = [f"{reduction.value(job.format(rate), 'faster_x'):.2f}" for rate in ("1gbit", "none")]
    rows = [
        [
            inference,
            f"{milliseconds:.0f} ms, {demo.value(exported, 'bytes') / 1e6:.1f} MB",
            f"{milliseconds * slower[0]:.0f} ms ({models[0]})",
            f"{milliseconds * slower[1]:.0f} ms, {dense:.1f} MB ({models[1]})",
        ],
        [
            training,
            f"{ratios[0]:.2f}",
            f"{ratios[1]:.2f} ({steps[0]})",
            f"{ratios[2]:.2f} ({steps[1]})",
        ],
        [link, speeds[0].format(faster[0]), speeds[1], speeds[2].format(faster[1])],
    ]
    return markdown(head, rows, lambda: [". ".join(chain(*(r.sources() for r in (demo, step, reduction))))])
