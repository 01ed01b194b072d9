"""The generated model against transformers' `nemotron_h` with the same weights, on a CPU in float32.

Each size and number of threads is measured in a process of its own, in which all contestants take turns; the minimum
of their runs counts. With one thread that is processor time, which other work on the machine disturbs less, with more
it is wall time. Peak memory is that of a process that runs one contestant and nothing else.
`python -m benchmarks.torch_model TASK` is such a process.
"""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

from n3c.backends.torch.emit import emit
from n3c.backends.torch.loading import load_package
from n3c.specs.huggingface import export_config
from n3c.specs.load import load_spec

TITLE = "Generated PyTorch"
EXPERTS = ("eager", "grouped_mm", "batched_mm")  # transformers' forms of the experts
SEQUENCES = EXPERTS[:2]  # batched_mm copies an expert for each token: eight times slower than these on sequences
COMPILED = " compiled"  # ends the name of a contestant that is
WORKS = {"train": "training step", "forward": "forward", "decode": "decode"}
PROMPT, ROUND = 64, 8  # tokens before decoding is timed, and tokens of a round
SPARE = 2048  # tokens that a cache has room for after the prompt

HEADER = (
    "| parameters | what | batch x length | threads | n3c ms | transformers ms | its form | times faster"
    " | products ms | logits |\n|---|---|---|---:|---:|---:|---|---:|---:|---:|"
)
# Super's first eleven blocks; chunk, taps, head and state sizes of every model of the family, as one group reads B and
# C for 8 or 12 heads (16 in Super); experts of 0.65 times the hidden size in a latent quarter of it.
SPEC = """schema = 1
name = "bench"
[model]
hidden_size = {hidden}
vocab_size = {vocab}
pattern = "MEMEMEM*EME"
max_position_embeddings = 8192
norm_eps = 1e-5
tie_word_embeddings = false
initializer_range = 0.02
[mamba]
num_heads = {heads}
head_dim = 64
state_size = 128
n_groups = {groups}
conv_kernel = 4
chunk_size = 128
[attention]
num_heads = {attention_heads}
num_kv_heads = 2
head_dim = 64
[moe]
num_experts = {experts}
top_k = {top_k}
intermediate_size = {intermediate}
shared_intermediate_size = {shared}
latent_size = {latent}
routed_scaling_factor = 2.5
norm_topk_prob = true
n_group = 1
topk_group = 1
"""
SIZES = {
    "10M": {
        "hidden": 256,
        "vocab": 4096,
        "heads": 8,
        "groups": 1,
        "attention_heads": 4,
        "experts": 48,
        "top_k": 4,
        "intermediate": 160,
        "shared": 320,
        "latent": 64,
    },
    "100M": {
        "hidden": 768,
        "vocab": 8192,
        "heads": 24,
        "groups": 2,
        "attention_heads": 12,
        "experts": 64,
        "top_k": 6,
        "intermediate": 512,
        "shared": 1024,
        "latent": 192,
    },
}


@dataclass(frozen=True)
class Task:
    """The measurement of one process."""

    size: str
    work: str  # of WORKS
    batch: int
    length: int  # tokens of a sequence; of the prompt, for decoding
    threads: int
    runs: int
    contestants: tuple[str, ...]
    memory: bool = False  # the peak of the one contestant, instead of times


def run(quick: bool) -> Iterator[str]:
    """Yield the tables: times, peak memory, and torch.compile."""
    runs = 2 if quick else 3
    sizes = ("10M",) if quick else ("10M", "100M")
    threads = (1,) if quick else (1, 2)
    shapes = [("train", 2, 512), ("forward", 2, 512), ("decode", 1, PROMPT), ("decode", 8, PROMPT)]
    if not quick:
        shapes[2:2] = [("train", 1, 2048), ("forward", 1, 2048)]
    yield f"transformers {version('transformers')}, float32, the same weights (`logits`: the largest difference),"
    yield "AdamW(fused=True) for both; the fastest of its expert forms is named. Minimum of interleaved runs; for one"
    yield "thread in processor time, for two in wall time. `products`: what n3c's matrix products and attention alone"
    yield "would take at the speed of a product of 1024 x 1024 x 1024 in the same process, which is hard to beat.\n"
    yield HEADER
    fastest: dict[tuple[str, str], str] = {}
    for size in sizes:
        for work, batch, length in shapes:
            for count in threads:
                forms = EXPERTS if work == "decode" else SEQUENCES
                task = Task(size, work, batch, length, count, runs, ("n3c", *forms))
                data = _child(task)
                form = min((name for name in data["seconds"] if name != "n3c"), key=data["seconds"].__getitem__)
                fastest.setdefault((size, work), form)
                yield _row(task, data, form)
    yield "\nPeak resident memory above that of the process with its model, before the first step; 1 thread.\n"
    yield "| parameters | what | batch x length | n3c MiB | transformers MiB | its form | n3c's share |"
    yield "|---|---|---|---:|---:|---|---:|"
    for size in sizes:
        for work, batch, length in shapes:
            form = fastest[size, work]
            ours, theirs = (
                _child(Task(size, work, batch, length, 1, 3, (name,), memory=True))["peak"] / 2**20
                for name in ("n3c", form)
            )
            share = f"{ours / theirs:.2f}" if theirs >= 1 else "-"
            yield f"| {size} | {work} | {batch} x {length} | {ours:.0f} | {theirs:.0f} | {form} | {share} |"
    if quick:
        return
    yield "\n`torch.compile` beside eager, one thread; transformers' experts in the form named above. For decoding it"
    yield "is `model.step = torch.compile(model.step)`. `-`: it does not compile.\n"
    yield "| parameters | what | batch x length | n3c ms | compiled | transformers ms | compiled | times faster |"
    yield "|---|---|---|---:|---:|---:|---:|---:|"
    for work, batch, length in (("decode", 1, PROMPT), ("decode", 8, PROMPT), ("forward", 2, 512), ("train", 2, 512)):
        names = ["n3c", "n3c" + COMPILED, form := fastest["10M", work], form + COMPILED]
        task = Task("10M", work, batch, length, 1, runs, tuple(names))
        measured = _child(task)["seconds"]
        found = [measured.get(name) for name in names]
        shown = " | ".join(f"{1e3 * seconds:.1f}" if seconds else "-" for seconds in found)
        ours, theirs = (min(seconds for seconds in pair if seconds) for pair in (found[:2], found[2:]))
        yield f"| 10M | {WORKS[work]} | {_shape(task)} | {shown} | {theirs / ours:.2f} |"


def _row(task: Task, data: dict[str, Any], form: str) -> str:
    ours, theirs = data["seconds"]["n3c"], data["seconds"].get(form)
    other, ratio = (f"{1e3 * theirs:.1f}", f"{theirs / ours:.2f}") if theirs else ("-", "-")
    floor = f"{1e3 * data['products']:.1f}" if data["products"] else "-"
    return (
        f"| {task.size} | {WORKS[task.work]} | {_shape(task)} | {task.threads} | {1e3 * ours:.1f} | {other}"
        f" | {form} | {ratio} | {floor} | {data['difference']:.0e} |"
    )


def _shape(task: Task) -> str:
    return f"{task.batch} x {1 if task.work == 'decode' else task.length}"


def _child(task: Task) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.torch_model", json.dumps(asdict(task))]
    environment = os.environ | {"OMP_NUM_THREADS": str(task.threads)}
    done = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True)
    return cast("dict[str, Any]", json.loads(done.stdout.splitlines()[-1]))


def measure(task: Task) -> dict[str, Any]:
    """Run a task in this process."""
    import torch

    torch.set_num_threads(task.threads)
    logging.disable(logging.WARNING)
    with tempfile.TemporaryDirectory() as folder:
        ours, theirs = _models(SIZES[task.size], Path(folder), task)
    ids = torch.randint(
        SIZES[task.size]["vocab"], (task.batch, task.length), generator=torch.Generator().manual_seed(0)
    )
    works = {name: _work(task, ours if name.startswith("n3c") else theirs, name, ids) for name in task.contestants}
    if task.memory:
        (work,) = works.values()
        before = _resident("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
        for _ in range(task.runs):
            work()
        return {"peak": _resident("VmHWM") - before}
    with torch.no_grad():
        difference = float((ours.eval()(ids).logits - theirs.eval()(ids).logits).abs().max())
    seconds: dict[str, float] = {}
    for turn in range(task.runs + 1):
        for name in list(works):
            rivals = [taken for other, taken in seconds.items() if not other.startswith("n3c")]
            if turn > 1 and not name.startswith("n3c") and seconds[name] > 1.3 * min(rivals):
                continue  # not its fastest form
            try:
                taken = works[name]()
            except Exception as error:
                if name == "n3c":
                    raise
                print(f"{name}: {error!r:.200}", file=sys.stderr)
                del works[name]
                continue
            if turn:  # the first compiles and touches memory
                seconds[name] = min(taken, seconds.get(name, taken))
    products = 0.0 if task.work == "decode" else _products(task, works["n3c"])
    return {"seconds": seconds, "difference": difference, "products": products}


def _products(task: Task, work: Callable[[], float]) -> float:
    """Return the seconds of the FLOPs of `work` at the speed of a large matrix product."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        work()
    size = 1024
    a, b = torch.randn(2, size, size).unbind(0)
    seconds = min(_seconds(task, lambda: torch.mm(a, b)) for _ in range(10))
    return float(counter.get_total_flops()) * seconds / (2 * size**3)


def _models(sizes: dict[str, int], folder: Path, task: Task) -> tuple[Any, Any]:
    """Return the generated model and transformers', those of them that the task wants, with the same weights."""
    import torch

    (folder / "spec.toml").write_text(SPEC.format(**sizes), encoding="utf-8")
    spec, _ = load_spec(folder / "spec.toml", [])
    torch.manual_seed(0)
    ours = load_package(emit(spec, "0" * 64)).Model()
    with torch.no_grad():
        for name, weight in ours.named_parameters():
            if name.endswith("dt_bias"):
                weight.uniform_(-4.0, -2.0)  # steps above time_step_min, at which transformers clamps
    if task.contestants == ("n3c",):
        return ours, None

    from transformers import NemotronHConfig, NemotronHForCausalLM

    config = export_config(spec)
    for key in ("n3c", "architectures", "model_type"):
        config.pop(key, None)
    config["attn_implementation"] = "sdpa"
    theirs = NemotronHForCausalLM(NemotronHConfig(**config))
    state = {name.replace("backbone.", "model.", 1): tensor for name, tensor in ours.state_dict().items()}
    theirs.load_state_dict(state)
    return (ours if task.contestants[0] == "n3c" else None), theirs


def _work(task: Task, model: Any, name: str, ids: Any) -> Callable[[], float]:
    """Return what does one unit of work and returns its seconds."""
    import torch

    work = {"train": _train, "forward": _forward, "decode": _decode}[task.work](task, model, name, ids)

    def timed() -> float:
        if not name.startswith("n3c"):
            model.set_experts_implementation(name.removesuffix(COMPILED))
        model.train(task.work == "train")
        with torch.inference_mode(task.work == "decode"):
            return work()

    return timed


def _train(task: Task, model: Any, name: str, ids: Any) -> Callable[[], float]:
    import torch

    # One optimizer a model: transformers' expert forms share its state.
    known = getattr(model, "_benchmark_optimizer", None)
    optimizer = known or torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    object.__setattr__(model, "_benchmark_optimizer", optimizer)
    called = torch.compile(model) if name.endswith(COMPILED) else model

    # As train.py does; transformers has no such option.
    options = {"return_logits": False} if name.startswith("n3c") else {}

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        called(ids, labels=ids, **options).loss.backward()
        optimizer.step()

    return lambda: _seconds(task, step)


def _forward(task: Task, model: Any, name: str, ids: Any) -> Callable[[], float]:
    import torch

    called = torch.compile(model) if name.endswith(COMPILED) else model

    def forward() -> None:
        with torch.no_grad():
            called(ids)

    return lambda: _seconds(task, forward)


def _decode(task: Task, model: Any, name: str, ids: Any) -> Callable[[], float]:
    import torch

    token = ids[:, :1]
    carried: list[Any] = []  # the state, from the first call on

    def ours() -> float:
        if not carried:
            carried.append(model.allocate_state(task.batch, task.length + SPARE))
            model.step(ids, carried[0])
        return min(_seconds(task, lambda: called(token, carried[0])) for _ in range(ROUND))

    called = model.step if name.startswith("n3c") else model
    called = torch.compile(called) if name.endswith(COMPILED) else called

    def theirs() -> float:
        if not carried:
            carried.append(model(ids, use_cache=True).past_key_values)
        step = partial(called, token, past_key_values=carried[0], use_cache=True)
        return min(_seconds(task, step) for _ in range(ROUND))

    return ours if name.startswith("n3c") else theirs


def _seconds(task: Task, step: Callable[[], object]) -> float:
    clock = time.process_time if task.threads == 1 else time.perf_counter
    start = clock()
    step()
    return clock() - start


def _resident(which: str) -> int:
    """Return VmRSS or VmHWM, the resident memory now or at its peak, in bytes (Linux)."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    (line,) = (line for line in lines if line.startswith(which + ":"))
    return 1024 * int(line.split()[1])


if __name__ == "__main__":
    given: dict[str, Any] = json.loads(sys.argv[1])
    print(json.dumps(measure(Task(contestants=tuple(given.pop("contestants")), **given))))
