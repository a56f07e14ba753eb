"""A call's tensors, decoded onto the device and checked: the last edge before they are computed with."""

import torch
from torch import Tensor

from peer.errors import MalformedMessage
from peer.messages import Call
from peer.pair_rows import PairRows
from peer.requests import Request
from peer.tensors import Role, WireTensor, all_finite, decode, decode_lengths, decode_row_index


class CallTensors:
    """Decodes for one device. Raises MalformedMessage for values that no correct caller sends."""

    def __init__(self, *, device: torch.device, longest_sequence: int) -> None:
        self._device = device
        self._longest_sequence = longest_sequence

    def rows(self, request: Request) -> PairRows:
        """A call's rows, spread to its pairs. One copy where rows are shared, none otherwise."""
        tensors = request.call.tensors
        x_UD = self._finite(tensors[Role.ROWS])
        lengths = None
        if Role.LENGTHS in tensors:
            longest = self._longest_sequence
            lengths = decode_lengths(tensors[Role.LENGTHS], counts=request.counts, longest=longest)
        num_distinct = x_UD.shape[0]
        if Role.ROW_INDEX not in tensors:
            return PairRows(request.uids, request.counts, num_distinct, x_UD, None, lengths)
        row_index_N = decode_row_index(tensors[Role.ROW_INDEX], num_rows=num_distinct).to(self._device)
        return PairRows(request.uids, request.counts, num_distinct, x_UD[row_index_N], row_index_N, lengths)

    def gradients(self, call: Call) -> Tensor:
        """(N, D)"""
        return self._finite(call.tensors[Role.GRADIENTS])

    def _finite(self, sent: WireTensor) -> Tensor:
        tensor = decode(sent, device=self._device)
        if not all_finite(tensor):
            raise MalformedMessage(f"{sent.spec.role.name} holds NaN or infinity")
        return tensor
