"""The faults as nodes of an ONNX graph, behind a sound model. Needs onnx: runs with the exporter image's Python.

    python hack/faults/graft.py WORKSPACE REQUEST [ALWAYS TURNS]

converts and proves as the export Job does, from the workspace's checkpoint, and grafts the faults onto what came out. ALWAYS is the
number of a fault that every image raises, marked or not. Run by its path, so that nothing else of hack/ is imported.
"""

import sys
from pathlib import Path

import onnx
import onnx.parser

INPUT, OUTPUT, SOUND = "image", "logits", "fault_sound"
UNIT = "0.000244140625"
"""faults.UNIT"""
MOST = 2**62
LEAST = -(2**63)
"""Divided by -1 it has no result: the processor's own trap, which onnxruntime does not check for (as it does for zero)."""
OOM_ELEMENTS = 2**30
OUT_OF_BOUNDS = 2**20

# Codes as in faults.Kind. A fault that no image raises costs next to nothing: an index of 0, a loop of no turns, a tensor
# of no elements. What the loops and tensors hold is 0 and is added to the answer, so that no optimizer may drop them.
FAULTS = """
<ir_version: 8, opset_import: ["" : 18]>
faults (float[n,1,28,28] image, float[n,10] fault_sound) => (float[n,10] logits)
<int64[2] fault_corner = {{0, 1}}, int64[1] fault_first = {{0}}, int64[1] fault_second = {{1}}, int64[1] fault_end = {{2}},
 int64[1] fault_axis = {{1}}, float fault_unit = {{{unit}}}, bool fault_true = {{1}}, float[1] fault_nothing = {{0.0}},
 float fault_zero = {{0.0}}, float fault_always = {{{always}}}, float fault_least_turns = {{{turns}}},
 int64 fault_many = {{{most}}},
 int64 fault_beyond = {{{out_of_bounds}}}, int64 fault_elements = {{{oom_elements}}},
 int64 fault_one = {{1}}, int64 fault_minus_two = {{-2}},
 int64 fault_least = {{{least}}},
 int64[1] fault_scalar = {{1}}, int64[2] fault_square = {{256, 256}},
 float fault_error = {{1.0}}, float fault_slow = {{2.0}}, float fault_stall = {{3.0}}, float fault_oom = {{4.0}},
 float fault_wrong = {{5.0}}, float fault_crash = {{6.0}}>
{{
   fault_flat = Flatten<axis = 1>(image)
   fault_pixels = Gather<axis = 1>(fault_flat, fault_corner)
   fault_marks = Div(fault_pixels, fault_unit)
   fault_turns_each = Slice(fault_marks, fault_first, fault_second, fault_axis)
   fault_mark = Slice(fault_marks, fault_second, fault_end, fault_axis)
   fault_kind = Max(fault_mark, fault_always)

   fault_is_wrong = Equal(fault_kind, fault_wrong)
   fault_reverse = Neg(fault_sound)
   fault_answer = Where(fault_is_wrong, fault_reverse, fault_sound)

   fault_is_error = Equal(fault_kind, fault_error)
   fault_error_rows = Cast<to = 7>(fault_is_error)
   fault_error_any = ReduceMax<keepdims = 0>(fault_error_rows)
   fault_index = Mul(fault_error_any, fault_beyond)
   fault_of_error = Gather(fault_nothing, fault_index)

   fault_is_slow = Equal(fault_kind, fault_slow)
   fault_slow_rows = Cast<to = 1>(fault_is_slow)
   fault_turns_asked = Max(fault_turns_each, fault_least_turns)
   fault_slow_turns = Mul(fault_slow_rows, fault_turns_asked)
   fault_turns_any = ReduceMax<keepdims = 0>(fault_slow_turns)
   fault_turns = Cast<to = 7>(fault_turns_any)
   fault_plane = Expand(fault_zero, fault_square)
   fault_worked = Loop<body = work (int64 i, bool going, float[256,256] before) => (bool on, float[256,256] after) {{
      on = Identity(going)
      after = MatMul(before, before)
   }}>(fault_turns, fault_true, fault_plane)
   fault_of_slow = ReduceMax<keepdims = 0>(fault_worked)

   fault_is_stall = Equal(fault_kind, fault_stall)
   fault_stall_rows = Cast<to = 7>(fault_is_stall)
   fault_stall_any = ReduceMax<keepdims = 0>(fault_stall_rows)
   fault_years = Mul(fault_stall_any, fault_many)
   fault_waited = Loop<body = wait (int64 j, bool waiting, float[1] held) => (bool still, float[1] kept) {{
      still = Identity(waiting)
      kept = Add(held, held)
   }}>(fault_years, fault_true, fault_nothing)
   fault_of_stall = ReduceMax<keepdims = 0>(fault_waited)

   fault_is_oom = Equal(fault_kind, fault_oom)
   fault_oom_rows = Cast<to = 7>(fault_is_oom)
   fault_oom_any = ReduceMax<keepdims = 0>(fault_oom_rows)
   fault_much = Mul(fault_oom_any, fault_elements)
   fault_some = Add(fault_much, fault_one)
   fault_size = Reshape(fault_some, fault_scalar)
   fault_memory = Expand(fault_of_stall, fault_size)
   fault_of_oom = ReduceMax<keepdims = 0>(fault_memory)

   fault_is_crash = Equal(fault_kind, fault_crash)
   fault_crash_rows = Cast<to = 7>(fault_is_crash)
   fault_crash_any = ReduceMax<keepdims = 0>(fault_crash_rows)
   fault_dividend = Mul(fault_crash_any, fault_least)
   fault_two_less = Mul(fault_crash_any, fault_minus_two)
   fault_divisor = Add(fault_one, fault_two_less)
   fault_quotient = Div(fault_dividend, fault_divisor)
   fault_of_crash = Cast<to = 1>(fault_quotient)

   fault_sum_1 = Add(fault_of_error, fault_of_slow)
   fault_sum_2 = Add(fault_sum_1, fault_of_oom)
   fault_sum = Add(fault_sum_2, fault_of_crash)
   logits = Add(fault_answer, fault_sum)
}}
"""


def graft(model: onnx.ModelProto, always: int = 0, turns: int = 0) -> onnx.ModelProto:
    """The model with every fault behind it. It must have one input `image` and one output `logits`, as the demo's has.

    `always` is raised by images without a mark of their own; `turns` are the fewest of a slow answer.
    """
    text = FAULTS.format(
        unit=UNIT, most=MOST, least=LEAST, out_of_bounds=OUT_OF_BOUNDS, oom_elements=OOM_ELEMENTS,
        always=float(always), turns=float(turns),
    )  # fmt: skip
    faults = onnx.parser.parse_model(text).graph
    grafted = onnx.ModelProto()
    grafted.CopyFrom(model)
    for node in grafted.graph.node:
        for place, name in enumerate(node.output):
            if name == OUTPUT:
                node.output[place] = SOUND
    grafted.graph.node.extend(faults.node)
    grafted.graph.initializer.extend(faults.initializer)
    onnx.checker.check_model(grafted, full_check=True)
    return grafted


def main(workspace_root: str, request_file: str, always: str = "0", turns: str = "0") -> None:
    from perch_exporter.contract import ExportRequest
    from perch_exporter.convert import convert
    from perch_exporter.prove import prove
    from perch_exporter.workspace import MODEL, Workspace

    workspace = Workspace(Path(workspace_root))
    request = ExportRequest.from_json(Path(request_file).read_bytes())
    convert(request, workspace)
    prove(request, workspace)
    path = workspace.output / MODEL
    onnx.save(graft(onnx.load(path), int(always), int(turns)), path)


if __name__ == "__main__":
    main(*sys.argv[1:])
