"""An engine for the rollouts of reinforcement learning, with the names of NeMo-RL's `GenerationInterface`.

Tensors in and out are PyTorch's, in dicts of the form that NeMo-RL gives them; sequences are padded on the right.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from n3c.backends.safetensors.checkpoint import Checkpoint
from n3c.backends.safetensors.checkpoint_fit import fitting_checkpoint
from n3c.runtime.generation.batch import Batch
from n3c.runtime.generation.capacity import Capacity
from n3c.runtime.generation.prefix_cache import PrefixCache
from n3c.runtime.generation.runner import Runner
from n3c.runtime.generation.sampling import Sampling
from n3c.runtime.generation.sequence import Options, Running

from .chunk import Described, described, of_tensors, update_error
from .update import WeightUpdates

CACHE_MEMORY = 1 << 30
"""Bytes of prefixes that are kept: rollouts of one prompt have all of it in common."""


class Rollouts:
    """Generates with a runner's engine, and takes weights between two calls of `generate`."""

    def __init__(self, runner: Runner, *, max_new_tokens: int, temperature: float = 1.0, top_p: float = 1.0) -> None:
        """`runner` is `n3c.runtime.generation.runner.open_runner`'s; the engine is this object's alone."""
        spec = runner.build.spec
        self.runner = runner
        self.max_new_tokens, self.temperature, self.top_p = max_new_tokens, temperature, top_p
        self.updates = WeightUpdates(spec)
        cache = PrefixCache(CACHE_MEMORY, runner.drafter is not None)
        self._batch = Batch(runner.engine, Capacity.of(spec), runner.drafter, cache)
        self._tensors: tuple[Described, ...] = ()
        self._drawn = 0
        """Sequences so far: each has random numbers of its own."""

    def generate(self, data: Mapping[str, Tensor], greedy: bool) -> dict[str, Tensor]:
        """Continue `input_ids` [N, S], of which `input_lengths` [N] count, however many there are.

        Returns `output_ids` [N, T], `generation_lengths` and `unpadded_sequence_lengths` [N], `logprobs` [N, T] (the
        model's own, float32, 0 where a token was given) and `truncated` [N]. N3CError: exit code 2 for prompts that the
        build cannot take, 5 where logits are not finite.
        """
        lengths: list[int] = data["input_lengths"].tolist()
        prompts = [ids[:length] for ids, length in zip(data["input_ids"].tolist(), lengths, strict=True)]
        for prompt in prompts:
            self._batch.capacity.require([prompt], 1)
        sequences = [self._begin(prompt, greedy) for prompt in prompts]
        logprobs: dict[int, list[float]] = {id(sequence): [] for sequence in sequences}
        waiting = list(reversed(sequences))
        while waiting or self._batch.rows:
            while waiting and self._batch.free:
                self._batch.add(waiting.pop())
            for taken in self._batch.round():
                assert taken.logprobs is not None
                logprobs[id(taken.sequence)].append(taken.logprobs.logprob)
        failure = next((sequence.failure for sequence in sequences if sequence.failure is not None), None)
        if failure is not None:
            raise failure
        return _padded(sequences, [logprobs[id(sequence)] for sequence in sequences])

    def _begin(self, prompt: Sequence[int], greedy: bool) -> Running:
        sampling = Sampling() if greedy else Sampling(self.temperature, top_p=self.top_p)
        options = Options(
            max_new_tokens=self.max_new_tokens, sampling=sampling, stop_ids=self.runner.eos_ids, logprobs=0
        )
        self._drawn += 1
        return Running.begin(prompt, self._drawn, options, None)

    def prepare_for_generation(self, *_: Any, **__: Any) -> bool:
        """Do nothing: the engine is always ready."""
        return True

    def finish_generation(self, *_: Any, **__: Any) -> bool:
        """Forget what was kept of prompts."""
        return self.invalidate_kv_cache()

    def invalidate_kv_cache(self) -> bool:
        """Forget what was kept of prompts."""
        assert self._batch.cache is not None
        self._batch.cache.clear()
        return True

    def shutdown(self) -> bool:
        """End what runs; the engine's memory goes with this object."""
        self._batch.clear()
        return True

    def prepare_refit_info(self, state_dict_info: Mapping[str, tuple[Sequence[int], Any]]) -> None:
        """Say what every update brings: name → shape and element type, in the order in which tensors come."""
        shapes = [list(shape) for shape, _ in state_dict_info.values()]
        self._tensors = described(list(state_dict_info), [dtype for _, dtype in state_dict_info.values()], shapes)

    def init_collective(self, ip: str, port: int, world_size: int, *, train_world_size: int) -> None:
        """Join the trainer's collective, behind its `train_world_size` ranks."""
        info = {"master_address": ip, "master_port": port, "world_size": world_size, "rank_offset": train_world_size}
        self.updates.init_weight_transfer_engine(info)

    def update_weights_from_collective(self) -> bool:
        """Take the tensors that the trainer's rank 0 broadcasts, as `prepare_refit_info` lists them."""
        return self._update({"names": [each.name for each in self._expected]})

    def update_weights_from_shared_memory(self, name: str) -> bool:
        """Take the tensors that lie in a segment of shared memory, as `prepare_refit_info` lists them."""
        return self._update({"names": [each.name for each in self._expected], "shared_memory": name})

    def update_weights_from_tensors(self, tensors: Mapping[str, Any]) -> bool:
        """Take tensors of this process: a module's `state_dict()`, or those of a checkpoint."""
        self.updates.start_weight_update()
        self.updates.receive(of_tensors(tensors))
        return self._take(self.updates.finish_weight_update())

    def update_weights_from_directory(self, directory: Path) -> bool:
        """Take the tensors of a checkpoint."""
        return self._take(fitting_checkpoint(self.runner.build.spec, directory))

    @property
    def _expected(self) -> tuple[Described, ...]:
        if not self._tensors:
            raise update_error("nothing says which tensors come", "call prepare_refit_info first")
        return self._tensors

    def _update(self, info: dict[str, Any]) -> bool:
        self.updates.start_weight_update()
        info |= {
            "dtype_names": [each.dtype for each in self._tensors],
            "shapes": [each.shape for each in self._tensors],
        }
        self.updates.update_weights(info)
        return self._take(self.updates.finish_weight_update())

    def _take(self, checkpoint: Checkpoint) -> bool:
        self._batch.replace_weights(checkpoint)
        return True


def _padded(sequences: Sequence[Running], logprobs: Sequence[Sequence[float]]) -> dict[str, Tensor]:
    longest = max((len(sequence.tokens) for sequence in sequences), default=0)
    ids = torch.zeros(len(sequences), longest, dtype=torch.int64)
    chosen = torch.zeros(len(sequences), longest)
    for row, (sequence, of_sequence) in enumerate(zip(sequences, logprobs, strict=True)):
        end = len(sequence.tokens)
        ids[row, :end] = torch.tensor(sequence.tokens)
        chosen[row, end - len(of_sequence) : end] = torch.tensor(of_sequence)
    return {
        "output_ids": ids,
        "generation_lengths": torch.tensor([len(sequence.new) for sequence in sequences]),
        "unpadded_sequence_lengths": torch.tensor([len(sequence.tokens) for sequence in sequences]),
        "logprobs": chosen,
        "truncated": torch.tensor([sequence.ending == "length" for sequence in sequences]),
    }
