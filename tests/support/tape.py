"""A float64 reference for any architecture: llama.cpp's recorded graph, run on complex numbers.

`record` lets llama.cpp build the graph of a few tokens, copies its nodes and the data they start
from, and stops it before it computes. `Tape.logits` runs the nodes in NumPy. Parameters may be
complex: the derivative of the loss along a direction d is the imaginary part of
loss(p + i·h·d) / h, exact to rounding for a tiny h, as nothing is subtracted. So the reference has
values only (`tape_values`), and no gradient rule that could share a mistake with the engine's.

Source: complex-step derivatives, Squire and Trapp, SIAM Review 40 (1998); the layout of
`ggml_tensor`, ggml.h.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np

from tests.support.blocks import TYPES, dequantize, ggml_base
from tests.support.models import Tensor, write_gguf
from tests.support.tape_values import VALUES

STEP = 1e-30
# Instead of -infinity in masks, which complex multiplication turns into NaN.
NEVER = -1e300
WEIGHTS = 1  # usage of a buffer that holds weights
DTYPES: dict[int, Any] = {0: np.float32, 1: np.float16, 26: np.int32, 27: np.int64}
STRUCTURAL = ("NONE", "VIEW", "RESHAPE", "PERMUTE", "TRANSPOSE")
Complex = np.ndarray[Any, np.dtype[np.complex128]]


class GgmlTensor(ctypes.Structure):
    """`ggml_tensor` of the pinned llama-cpp-python."""

    _fields_ = (
        ("type", ctypes.c_int32), ("buffer", ctypes.c_void_p), ("ne", ctypes.c_int64 * 4),
        ("nb", ctypes.c_size_t * 4), ("op", ctypes.c_int32), ("op_params", ctypes.c_int32 * 16),
        ("flags", ctypes.c_int32), ("src", ctypes.c_void_p * 10), ("view_src", ctypes.c_void_p),
        ("view_offs", ctypes.c_size_t), ("data", ctypes.c_void_p), ("name", ctypes.c_char * 64),
    )  # fmt: skip


@dataclass(frozen=True)
class Node:
    """A tensor as it was recorded.

    Attributes:
        op: The operation, with the kind of a unary or gated one: "UNARY.SILU".
        type: ggml's number of the element type.
        shape: In NumPy order, four dimensions.
        strides: In bytes, in NumPy order.
        root: Address of the tensor whose memory it lies in; its own if it is no view.
        offset: In bytes from the root's start.
        sources: Addresses, None for gaps.
        ints: Parameters of the operation; `floats` reads the same words as floats.
    """

    op: str
    name: str
    type: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    root: int
    offset: int
    sources: tuple[int | None, ...]
    ints: np.ndarray[Any, np.dtype[np.int32]]

    @property
    def floats(self) -> list[float]:
        """The operation's parameters as floats."""
        return [float(x) for x in self.ints.view(np.float32)]


def node_at(address: int) -> Node:
    """Copy a tensor's description."""
    raw = GgmlTensor.from_address(address)
    op = ggml_base().ggml_op_name(raw.op).decode()
    if op in ("UNARY", "GLU"):
        op = f"{op}.{ggml_base().ggml_op_desc(address).decode()}"
    sources: list[int | None] = [source or None for source in raw.src]
    while sources and sources[-1] is None:
        sources.pop()
    return Node(
        op=op,
        name=raw.name.decode(errors="replace"),
        type=raw.type,
        shape=tuple(raw.ne)[::-1],
        strides=tuple(raw.nb)[::-1],
        root=raw.view_src or address,
        offset=raw.view_offs if raw.view_src else 0,
        sources=tuple(sources),
        ints=np.frombuffer(bytes(raw.op_params), np.int32).copy(),
    )


class Tape:
    """Nodes in the order of execution, and the data that they start from."""

    def __init__(self) -> None:
        self.architecture = ""
        self.nodes: dict[int, Node] = {}
        self.order: list[int] = []
        self.leaves: dict[int, np.ndarray[Any, Any]] = {}
        self.weights: dict[str, int] = {}

    def add(self, address: int) -> None:
        """Append a node, and copy the leaves that it reads."""
        self._describe(address)
        self.order.append(address)
        for source in filter(None, self.nodes[address].sources):
            self._describe(source)
            root = self.nodes[source].root
            if root not in self.leaves and self.nodes[root].op == "NONE":
                self._copy(root)

    def _describe(self, address: int) -> None:
        if address not in self.nodes:
            self.nodes[address] = node_at(address)
            self._describe(self.nodes[address].root)

    def _copy(self, root: int) -> None:
        node, raw = self.nodes[root], GgmlTensor.from_address(root)
        data = ctypes.string_at(raw.data, ggml_base().ggml_nbytes(root))
        if node.type in DTYPES:
            values = np.frombuffer(data, DTYPES[node.type])
        else:
            name = next(key for key, kind in TYPES.items() if kind.number == node.type)
            values = dequantize(data, name, node.shape).ravel()
        is_float = values.dtype.kind == "f"
        values = values.astype(np.float64 if is_float else np.int64)
        self.leaves[root] = np.maximum(values, NEVER) if is_float else values
        if (
            raw.buffer and ggml_base().ggml_backend_buffer_get_usage(raw.buffer) == WEIGHTS
        ) or ".lora_" in node.name:
            self.weights[node.name] = root

    def matrices(self) -> dict[str, tuple[int, ...]]:
        """Return the weights that are the first factor of a matrix product, with their shapes."""
        found = {}
        for address in self.order:
            node = self.nodes[address]
            first = node.sources[0] if node.sources else None
            if first is None or first not in self.weights.values():
                continue
            if node.op in ("MUL_MAT", "MUL_MAT_ID"):
                weight = self.nodes[first]
                found[weight.name] = weight.shape
        return found

    def parameters(self) -> dict[str, np.ndarray[Any, Any]]:
        """Return the adapter's matrices by name, in NumPy order without leading ones."""
        found = {}
        for name, root in self.weights.items():
            if ".lora_" in name:
                shape = self.nodes[root].shape
                keep = shape[1:] if shape[1] > 1 else shape[2:]
                found[name] = self.leaves[root].reshape(keep)
        return found

    def logits(self, values: Mapping[str, Any] | None = None) -> Complex:
        """Run the graph; `values` replaces parameters by name. Returns (T, V)."""
        given = {self.weights[name]: np.asarray(v).ravel() for name, v in (values or {}).items()}
        memory: dict[int, np.ndarray[Any, Any]] = {}
        frozen = set(self.weights.values())
        for address in self.order:
            node = self.nodes[address]
            if node.op in STRUCTURAL:
                continue
            sources = [
                None if source is None else self._read(memory, given, frozen, source)
                for source in node.sources
            ]
            window = self._window(memory, given, frozen, address)
            if node.op == "SET_ROWS":
                rows, ids = sources[0], sources[1]
                assert rows is not None
                assert ids is not None
                i3, i2, i1 = np.indices(rows.shape[:3])
                window[i3, i2, ids[0, i3 % ids.shape[1], i2 % ids.shape[2], i1]] = rows
            else:
                window[...] = VALUES[node.op](node, sources)
        return np.array(self._window(memory, given, frozen, self.order[-1])[0, 0])

    def _read(self, memory: Any, given: Any, frozen: set[int], address: int) -> Any:
        """Return a tensor's values: a copy, save of weights, as a node may overwrite its source."""
        window = self._window(memory, given, frozen, address)
        return window if self.nodes[address].root in frozen else window.copy()

    def _window(self, memory: Any, given: Any, frozen: set[int], address: int) -> Any:
        """Return the part of its root's memory that a tensor is."""
        node = self.nodes[address]
        root = self.nodes[node.root]
        if node.root not in memory:
            if node.root in given:
                memory[node.root] = given[node.root]
            elif node.root in self.leaves:
                leaf = self.leaves[node.root]
                is_float = leaf.dtype.kind == "f" and node.root not in frozen
                memory[node.root] = leaf.astype(np.complex128) if is_float else leaf
            else:
                is_int = root.type in (26, 27)
                n = int(np.prod(root.shape))
                memory[node.root] = np.zeros(n, np.int64 if is_int else np.complex128)
        flat = memory[node.root]
        if 0 in node.shape:
            return np.zeros(node.shape, flat.dtype)
        if root.type not in DTYPES:
            assert node.root == address, "a view of quantized weights"
            return flat.reshape(node.shape)
        size = np.dtype(DTYPES[root.type]).itemsize
        strides = [
            0 if n == 1 else stride // size * flat.itemsize
            for n, stride in zip(node.shape, node.strides, strict=True)
        ]
        return np.lib.stride_tricks.as_strided(flat[node.offset // size :], node.shape, strides)


def record(
    path: Path, tokens: Sequence[int], *, adapter: Path | None = None, flash: bool = False
) -> Tape:
    """Record llama.cpp's graph of one sequence, whose every position has logits."""
    tape, failed = Tape(), []

    def on_node(address: int, ask: bool, _: object) -> bool:
        try:
            if ask:
                tape.add(address)
        except Exception as error:  # must not cross C code
            failed.append(error)
        return False

    api = llama_cpp
    parameters = api.llama_model_default_params()
    parameters.n_gpu_layers, parameters.use_extra_bufts = 0, False
    model = api.llama_model_load_from_file(str(path).encode(), parameters)
    assert model, f"llama.cpp cannot open {path.name}"
    settings = api.llama_context_default_params()
    n = len(tokens)
    settings.n_ctx, settings.n_batch, settings.n_ubatch = 256, max(64, n), max(64, n)
    settings.n_threads = settings.n_threads_batch = 1
    settings.type_k = settings.type_v = 0
    settings.flash_attn_type = int(flash)
    callbacks = (
        api.ggml_backend_sched_eval_callback(on_node), api.ggml_abort_callback(lambda _: True),
    )  # fmt: skip
    settings.cb_eval, settings.abort_callback = callbacks
    context = api.llama_init_from_model(model, settings)
    assert context
    tape = Tape()
    text = ctypes.create_string_buffer(64)
    api.llama_model_meta_val_str(model, b"general.architecture", text, 64)
    tape.architecture = text.value.decode()
    if adapter is not None:
        loaded = api.llama_adapter_lora_init(model, str(adapter).encode())
        assert loaded, f"llama.cpp cannot open {adapter.name}"
        array = (api.llama_adapter_lora_p_ctypes * 1)(loaded)
        api.llama_set_adapters_lora(context, array, 1, (ctypes.c_float * 1)(1.0))
    batch = api.llama_batch_init(n, 0, 1)
    for i, token in enumerate(tokens):
        batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.logits[i] = int(token), i, 1, 1
        batch.seq_id[i][0] = 0
    batch.n_tokens = n
    code = api.llama_decode(context, batch)
    api.llama_batch_free(batch)
    api.llama_free(context)
    api.llama_model_free(model)
    if failed:
        raise failed[0]
    assert code == 2, "the abort callback ends the call"
    return tape


def nats(logits: Any, targets: Sequence[int]) -> Any:
    """Return the summed negative log-likelihood of `targets`; -1 is ignored."""
    rows = np.flatnonzero(np.asarray(targets) >= 0)
    z = logits[rows] - logits[rows].real.max(-1, keepdims=True)
    chosen = z[np.arange(len(rows)), np.asarray(targets)[rows]]
    return (np.log(np.exp(z).sum(-1)) - chosen).sum()


def slope(
    tape: Tape, values: Mapping[str, Any], direction: Mapping[str, Any], targets: Sequence[int]
) -> float:
    """Return the derivative of the summed loss along a direction of the parameters."""
    moved = {name: v + 1j * STEP * direction.get(name, 0.0) for name, v in values.items()}
    return float(nats(tape.logits(moved), targets).imag / STEP)


def write_lora(path: Path, base: Path, *, rank: int = 2, alpha: float = 4.0, seed: int = 3) -> Path:
    """Write an adapter of random pairs on every matrix of a model; return its path."""
    tape = record(base, [1, 2, 3, 4])
    rng = np.random.default_rng(seed)
    tensors = []
    for name, (_, n_experts, n_out, n_in) in sorted(tape.matrices().items()):
        if name == "token_embd.weight" or min(n_out, n_in) < 2:
            continue
        experts = (n_experts,) if n_experts > 1 else ()
        pair = (("a", (rank, n_in), n_in**-0.5), ("b", (n_out, rank), 0.05))
        for suffix, matrix, size in pair:
            shape = (*experts, *matrix)
            data = (size * rng.normal(size=shape)).astype(np.float32).tobytes()
            tensors.append(Tensor(f"{name}.lora_{suffix}", "F32", shape, data))
    metadata = {
        "general.architecture": tape.architecture, "general.type": "adapter",
        "adapter.type": "lora", "adapter.lora.alpha": alpha,
    }  # fmt: skip
    write_gguf(path, metadata, tensors)
    return path
