"""A build and the weights of a checkpoint, to generate with: `n3c.runtime.load`."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, overload

from n3c.backends.progress import SILENT, Progress
from n3c.runtime.build_folder import OpenedBuild, open_build
from n3c.runtime.engines.choice import ENGINE_HELP, Device, EngineName, require_device
from n3c.runtime.options import Argument, Needs, Option, checked, usage_error

if TYPE_CHECKING:  # these load numpy
    from .loop import Generation
    from .result import Generated, Piece
    from .runner import Runner

Prompt = str | Sequence[int]
"""A text, or token ids."""


class Stream(Iterator["Piece"]):
    """The pieces of a request as they come. KeyboardInterrupt ends it and is passed on; `result` has what there is."""

    def __init__(self, generation: "Generation") -> None:
        self._generation = generation
        self._pieces = (piece for step in generation.steps() for piece in step)

    def __next__(self) -> "Piece":
        return next(self._pieces)

    def interrupt(self) -> None:
        """End the sequences that run where they are, as an interrupt does: no piece follows."""
        self._pieces.close()
        self._generation.interrupt()

    def result(self) -> "Generated":
        """Return the result so far; after the last piece it is complete."""
        return self._generation.result()


SAMPLED = Needs("temperature", test=lambda temperature: temperature > 0, said="--temperature above 0")
IDS = "IDS"


class Model:
    """Generates with a build. The weights are read by the first request, for as many sequences as it has prompts."""

    def __init__(
        self,
        build: OpenedBuild,
        weights: Path,
        device: Device,
        engine: EngineName | None,
        speculate: bool,
        progress: Progress,
    ) -> None:
        from .tokenizer import find_tokenizer

        self.build = build
        self.weights = weights
        self.device: Device = device
        self.engine: EngineName | None = engine
        self.tokenizer = find_tokenizer([weights], build.spec.model.vocab_size)
        self._speculate = speculate
        self._progress = progress
        self._runner: Runner | None = None
        self._stream: Stream | None = None

    @overload
    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        *,
        max_new_tokens: int = ...,
        temperature: float = ...,
        top_k: int = ...,
        top_p: float = ...,
        min_p: float = ...,
        presence_penalty: float = ...,
        frequency_penalty: float = ...,
        repetition_penalty: float = ...,
        seed: int = ...,
        stop: Sequence[str] = ...,
        stop_ids: str | Sequence[int] = ...,
        ignore_eos: bool = ...,
        reasoning_budget: int | None = ...,
        thinking_tags: tuple[str, str] = ...,
        chat: bool = ...,
        parse_special: bool = ...,
        stream: Literal[False] = ...,
    ) -> "Generated": ...

    @overload
    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        *,
        max_new_tokens: int = ...,
        temperature: float = ...,
        top_k: int = ...,
        top_p: float = ...,
        min_p: float = ...,
        presence_penalty: float = ...,
        frequency_penalty: float = ...,
        repetition_penalty: float = ...,
        seed: int = ...,
        stop: Sequence[str] = ...,
        stop_ids: str | Sequence[int] = ...,
        ignore_eos: bool = ...,
        reasoning_budget: int | None = ...,
        thinking_tags: tuple[str, str] = ...,
        chat: bool = ...,
        parse_special: bool = ...,
        stream: Literal[True],
    ) -> Stream: ...

    @checked
    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        *,
        max_new_tokens: Annotated[int, Option("Most new tokens.", least=0)] = 128,
        temperature: Annotated[
            float, Option("Draw from softmax(logits / T); 0: the likeliest token.", metavar="T", least=0)
        ] = 0.0,
        top_k: Annotated[
            int, Option("Draw from the K likeliest tokens; 0: all.", metavar="K", least=0, needs=SAMPLED)
        ] = 0,
        top_p: Annotated[
            float,
            Option(
                "Draw from the fewest tokens whose probabilities sum to P.", metavar="P", above=0, most=1, needs=SAMPLED
            ),
        ] = 1.0,
        min_p: Annotated[
            float,
            Option(
                "Draw from the tokens of at least P times the likeliest one's probability.",
                least=0,
                most=1,
                needs=SAMPLED,
            ),
        ] = 0.0,
        presence_penalty: Annotated[
            float, Option("Taken from the logits of tokens that were generated before.", least=-2, most=2)
        ] = 0.0,
        frequency_penalty: Annotated[
            float, Option("Taken from them for each time that they were.", least=-2, most=2)
        ] = 0.0,
        repetition_penalty: Annotated[
            float, Option("Divides the logits of tokens of the prompt or generated before.", above=0, most=10)
        ] = 1.0,
        seed: Annotated[int, Option("Of the random numbers.", least=0, needs=SAMPLED)] = 0,
        stop: Annotated[Sequence[str], Option("Text that ends a sequence, and is not printed; may repeat.")] = (),
        stop_ids: Annotated[
            str | Sequence[int],
            Option("Token ids that end a sequence, beside those of the checkpoint.", metavar=IDS),
        ] = (),
        ignore_eos: Annotated[bool, Option("Continue after the checkpoint's end-of-sequence tokens.")] = False,
        reasoning_budget: Annotated[int | None, Option("Tokens inside the thinking tags at most.", least=0)] = None,
        thinking_tags: Annotated[
            tuple[str, str],
            Option(
                "Thinking tags, as text or as token ids.",
                metavar="START END",
                needs=Needs("reasoning_budget"),
            ),
        ] = ("<think>", "</think>"),
        chat: Annotated[bool, Option("Take each text as a user's message, by the checkpoint's chat template.")] = False,
        parse_special: Annotated[bool, Option("Let special tokens in a text be those tokens.")] = False,
        stream: bool = False,
    ) -> "Generated | Stream":
        """Continue `prompts`, each a text or token ids; one alone may be given without a list.

        With `stream` the pieces are yielded as they come; the next request ends it where it is.
        N3CError: exit code 2 where the build cannot take the prompts or there is no chat template, 4 where the device
        is not there, 6 where the weights do not fit or a text has no tokenizer.
        """
        from .capacity import Capacity
        from .prompts import parse_ids, tag_ids
        from .sampling import Sampling
        from .sequence import Options

        ids = [self._ids(prompt, chat, parse_special) for prompt in _listed(prompts)]
        if stop and self.tokenizer is None:
            raise usage_error("--stop has no effect: it needs a tokenizer.json in the checkpoint")
        stops = parse_ids(stop_ids) if isinstance(stop_ids, str) else stop_ids
        if stops is None:
            raise usage_error(f"--stop-ids: {stop_ids!r} is not a list of token ids, as 1,2,3")
        tags = tag_ids(thinking_tags, self.tokenizer, self.weights) if reasoning_budget is not None else None
        spec = self.build.spec
        Capacity.of(spec).require(ids, max(spec.serving.batch_sizes))
        options = Options(
            max_new_tokens=max_new_tokens,
            sampling=Sampling(
                temperature, top_k, top_p, seed, min_p, presence_penalty, frequency_penalty, repetition_penalty
            ),
            stop_texts=tuple(stop),
            tags=tags,
            reasoning_budget=reasoning_budget,
        )
        runner = self._ready(len(ids))
        options = replace(options, stop_ids=frozenset([*stops, *(() if ignore_eos else runner.eos_ids)]))
        if self._stream is not None:
            self._stream.interrupt()  # the engine has the states of one request
        self._stream = running = Stream(runner.generation(ids, options))
        if stream:
            return running
        for _ in running:
            pass
        return running.result()

    def _ids(self, prompt: Prompt, chat: bool, parse_special: bool) -> list[int]:
        from .prompts import encoded, encoded_chat

        if not isinstance(prompt, str):
            return list(prompt)
        encode = encoded_chat if chat else encoded
        return encode(prompt, self.tokenizer, self.weights, parse_special=parse_special)

    def _ready(self, sequences: int) -> "Runner":
        """Return what runs `sequences` prompts at once; it is opened anew where the one at hand takes fewer."""
        from .runner import open_runner

        if self._runner is None or self._runner.engine.batch < sequences:
            self._runner = None  # frees its weights before others are read
            self._progress.phase("load")
            self._runner = open_runner(
                self.build,
                self.weights,
                device=self.device,
                engine=self.engine,
                sequences=sequences,
                speculate=self._speculate,
                progress=self._progress,
            )
        return self._runner


def _listed(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """Return the prompts of a request, which may be one alone."""
    if isinstance(prompts, str):
        return [prompts]
    ids = [prompt for prompt in prompts if isinstance(prompt, int)]
    return [ids] if ids else [prompt for prompt in prompts if not isinstance(prompt, int)]


@checked
def load(
    build: Annotated[Path | str, Argument("BUILD")],
    weights: Annotated[Path | str | None, Option("Checkpoint directory or hub id; must fit the build.", metavar="DIR")],
    *,
    no_mtp: Annotated[bool, Option("Decode token by token, without drafts.")] = False,
    device: Annotated[Device, Option("Where to run.")] = "cpu",
    engine: Annotated[EngineName | None, Option(ENGINE_HELP)] = None,
    progress: Progress = SILENT,
) -> Model:
    """Open a build to generate with the weights of a checkpoint.

    N3CError: exit code 2 without weights or for an engine that does not run on the device, 6 where the build is
    damaged or the tokenizer is none of this model.
    """
    from n3c.backends.safetensors.locate import checkpoint_directory

    from .runner import require_weights

    if engine is not None:
        require_device(engine, device)
    progress.phase("open")
    opened = open_build(Path(build))
    folder = require_weights(None if weights is None else checkpoint_directory(weights))
    return Model(opened, folder, device, engine, not no_mtp, progress)
