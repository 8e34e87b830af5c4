"""What a Triton pod answers at its metrics port, for simulations."""

from __future__ import annotations


def triton_text(
    version: int, succeeded: int, failed: int, cancelled: int, microseconds: int, executions: int | None = None, rejected: int = 0
) -> str:
    """As Triton 2.51 writes it, in part, with another model's lines between. executions: as many as requests if omitted; below
    0: not counted."""
    mine = f'model="digits",version="{version}"'
    executed = succeeded + failed if executions is None else executions
    return (
        "# HELP nv_inference_request_success Number of successful inference requests, all batch sizes\n"
        "# TYPE nv_inference_request_success counter\n"
        f"nv_inference_request_success{{{mine}}} {succeeded}\n"
        'nv_inference_request_success{model="letters",version="1"} 7\n'
        "# TYPE nv_inference_request_failure counter\n"
        f'nv_inference_request_failure{{model="digits",reason="BACKEND",version="{version}"}} {failed}\n'
        f'nv_inference_request_failure{{model="digits",reason="CANCELED",version="{version}"}} {cancelled}\n'
        f'nv_inference_request_failure{{model="digits",reason="REJECTED",version="{version}"}} {rejected}\n'
        + (f"nv_inference_exec_count{{{mine}}} {executed}\n" if executed >= 0 else "")
        + f"nv_inference_request_duration_us{{{mine}}} {microseconds}\n"
        f"nv_inference_queue_duration_us{{{mine}}} {microseconds // 10}\n"
        f"nv_inference_pending_request_count{{{mine}}} 0\n"
        "nv_cpu_utilization 0.99\n"
    )
