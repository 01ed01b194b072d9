"""A module that looks like full TensorRT, and records what is asked of it."""

from __future__ import annotations

from enum import IntEnum
from pathlib import Path
from types import SimpleNamespace
from typing import Any

LISTING = """Layers:
Name: k0, LayerType: kgen, Inputs: [ { Name: x, Dimensions: [2], Strides: [1], Datatype: Float }], \
Outputs: [ { Name: y, Dimensions: [2], Strides: [1], Datatype: Float }], TacticName: t, StreamId: 0, Metadata:
"""


class StandIn:
    """A module that looks like `tensorrt`: no ComputeCapability, and everything that is asked of it in `calls`."""

    __name__ = "tensorrt"
    __version__ = "11.4.0.3"

    class ILogger: ...

    class IProgressMonitor: ...

    class IStreamWriter: ...

    class IAttentionOutputLayer: ...

    class NetworkDefinitionCreationFlag(IntEnum):
        STRONGLY_TYPED = 3

    class ProfilingVerbosity(IntEnum):
        DETAILED = 2

    class HardwareCompatibilityLevel(IntEnum):
        NONE = 0
        AMPERE_PLUS = 1

    class LayerType(IntEnum):
        MATRIX_MULTIPLY = 1
        ATTENTION_OUTPUT = 2

    def __init__(self, *, fails: str = "") -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.config = SimpleNamespace(add_optimization_profile=self._add_profile)
        self.fails = fails
        self.Builder, self.OnnxParser = self._builder, self._parser
        self.attention = SimpleNamespace(decomposable=False)

    def _builder(self, logger: Any) -> Any:
        def create_network(flags: int) -> Any:
            self.calls.append(("network", flags))
            layers = [SimpleNamespace(type=self.LayerType.MATRIX_MULTIPLY), Layer(self)]
            return SimpleNamespace(num_layers=len(layers), get_layer=layers.__getitem__)

        def build(network: Any, config: Any, writer: Any) -> bool:
            self.calls.append(("build", network.num_layers))
            if self.fails:
                logger.log(1, self.fails)
                return False
            config.progress_monitor.phase_start("Building", None, 1)
            logger.log(4, LISTING)
            logger.log(4, "Max Scratch Memory: 512 bytes")
            assert config.progress_monitor.step_complete("Building", 0)
            return all(writer.write(piece) == len(piece) for piece in (b"engine", b"!"))

        return SimpleNamespace(
            create_network=create_network,
            create_builder_config=lambda: self.config,
            create_optimization_profile=lambda: Profile(),
            build_serialized_network_to_stream=build,
        )

    def _parser(self, network: Any, logger: Any) -> Any:
        def parse(model: bytes) -> bool:
            self.calls.append(("parse", model))
            return True

        def parse_from_file(path: str) -> bool:
            return parse(Path(path).read_bytes())

        return SimpleNamespace(parse=parse, parse_from_file=parse_from_file)

    def _add_profile(self, profile: Profile) -> None:
        self.calls.append(("profile", profile.shapes))


class Layer:
    """An attention layer, of which the binding gives the base class."""

    def __init__(self, trt: StandIn) -> None:
        self.type, self.attention = trt.LayerType.ATTENTION_OUTPUT, trt.attention


class Profile:
    """Records the shapes of dynamic inputs."""

    def __init__(self) -> None:
        self.shapes: dict[str, tuple[tuple[int, ...], ...]] = {}

    def set_shape(self, name: str, *shapes: tuple[int, ...]) -> None:
        self.shapes[name] = shapes
