"""What we rely on in vLLM and no test on CPU runs: sleep, the transfer of weights over NCCL, AMX, mixtures of experts.

Read for 0.22.1, 0.26.0, 0.27.1 and 0.31.0; TRL 1.16 supports 0.22 to 0.31.
"""

from __future__ import annotations

import dataclasses
import inspect
import io
from contextlib import redirect_stdout

import pytest
import torch
from vllm import LLM, EngineArgs
from vllm.distributed.weight_transfer import nccl_common, nccl_engine, packed_tensor
from vllm.model_executor.layers import utils as linears
from vllm.model_executor.layers.fused_moe.experts.cpu_moe import CPUUnquantizedExperts
from vllm.model_executor.models.transformers.base import Base
from vllm.utils.system_utils import suppress_stdout

from polyphony.launch.cluster.weights import Announcement, _endpoint, _is_stateful
from polyphony.launch.sections import NOT_FREE
from polyphony.trainer.engine.cpu_build import PACKED, _keeping, unpacked
from polyphony.trainer.engine.engine import classes_left_alone
from polyphony.trainer.engine.vllm import with_descriptor
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


def test_a_standard_output_without_a_descriptor_is_set_aside_while_vllm_starts():
    with redirect_stdout(io.StringIO()) as said:
        with pytest.raises(io.UnsupportedOperation), suppress_stdout():
            pass
        with with_descriptor(), suppress_stdout():
            print("starting")
        print("back")
    assert said.getvalue() == "back\n"


def test_linears_are_packed_for_amx_where_a_function_of_the_module_says_so():
    assert parameters(linears.check_cpu_sgl_kernel) == ["n", "k", "dtype"]
    assert "check_cpu_sgl_kernel(N, K, dtype)" in inspect.getsource(linears.dispatch_cpu_unquantized_gemm)


def test_experts_are_packed_by_one_method_from_three_weights():
    assert parameters(CPUUnquantizedExperts.process_weights_after_loading) == ["layer"]
    packs = inspect.getsource(CPUUnquantizedExperts)
    assert all(f'layer, "{name}"' in packs for name in PACKED)


def test_experts_are_loaded_unpacked_and_packed_again():
    class Experts:
        def process_weights_after_loading(self, layer):
            layer.w13_weight = torch.nn.Parameter(layer.w13_weight.data.flip(0))

    Experts.process_weights_after_loading = _keeping(Experts.process_weights_after_loading)
    layer = torch.nn.Module()
    layer.w13_weight = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
    Experts().process_weights_after_loading(layer)
    assert layer.w13_weight.tolist() == [2, 1]
    model = torch.nn.Sequential(layer)
    for loaded in ([3.0, 4.0], [5.0, 6.0]):
        with unpacked(model):
            layer.w13_weight.data.copy_(torch.tensor(loaded))
        assert layer.w13_weight.tolist() == loaded[::-1]


def test_classes_of_transformers_are_rewritten_by_one_method():
    assert parameters(Base._decorate_for_torch_compile) == []
    rewrites = Base._decorate_for_torch_compile
    with classes_left_alone():
        assert Base._decorate_for_torch_compile is not rewrites
    assert Base._decorate_for_torch_compile is rewrites
