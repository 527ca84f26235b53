"""What we rely on in vLLM and no test on CPU runs: sleep, and the transfer of weights over NCCL.

Read for 0.22.1, 0.26.0, 0.27.1 and 0.31.0; TRL 1.16 supports 0.22 to 0.31.
"""

from __future__ import annotations

import dataclasses
import inspect

from vllm import LLM, EngineArgs
from vllm.distributed.weight_transfer import nccl_common, nccl_engine, packed_tensor

from polyphony.launch.cluster.weights import Announcement, _endpoint, _is_stateful
from polyphony.launch.sections import NOT_FREE
from tests.test_trl_contract import parameters

MEETING = {"master_address": "10.0.0.1", "master_port": 29400, "world_size": 3}


def test_engines_sleep_and_wake_by_level_and_tag():
    assert parameters(LLM.sleep)[0] == "level"
    assert parameters(LLM.wake_up) == ["tags"]


def test_workers_take_weights_in_three_calls():
    assert parameters(LLM.init_weight_transfer_engine) == ["request"]
    assert parameters(LLM.update_weights) == ["request"]
    for call in (LLM.start_weight_update, LLM.finish_weight_update):
        needed = [p for p in inspect.signature(call).parameters.values() if p.default is p.empty and p.name != "self"]
        assert needed == []


def test_the_handshake_and_the_announcement_are_what_the_worker_reads():
    assert _is_stateful()  # this vLLM is 0.28 or newer: `packed` belongs to the handshake
    assert _endpoint() is nccl_common.trainer_init
    read = nccl_common.NCCLWeightTransferInitInfo(**MEETING, rank_offset=1, packed=True)
    assert (read.packed, read.world_size) == (True, 3)
    nccl_engine.NCCLWeightTransferUpdateInfo(**dataclasses.asdict(Announcement.of([], dtype=None)))


def test_both_ends_cut_the_stream_alike_by_default():
    names = ["iterator", "group", "src", "post_iter_func"]
    sends = inspect.signature(packed_tensor.packed_nccl_broadcast_producer).parameters
    assert list(sends)[:4] == names
    read = nccl_common.NCCLWeightTransferInitInfo(**MEETING, rank_offset=1, packed=True)
    assert sends["buffer_size_bytes"].default == read.packed_buffer_size_bytes
    assert sends["num_buffers"].default == read.packed_num_buffers


def test_keys_that_are_told_apart_exist():
    fields = {field.name for field in dataclasses.fields(EngineArgs)}
    assert set(NOT_FREE) <= fields
    assert {"max_num_batched_tokens", "max_num_seqs", "enforce_eager", "disable_log_stats"} <= fields
