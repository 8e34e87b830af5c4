"""From Triton's text to counts, and from two looks to a batch or to none."""

from __future__ import annotations

import math
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from perch.api import Tally
from perch.counters import (
    MAX_SKEW,
    Counters,
    CountersError,
    PodScrape,
    Scrape,
    Totals,
    counter_batch,
    difference,
    parse_counters,
)

NOON = datetime(2026, 1, 1, 12, tzinfo=UTC)
STABLE, CANARY = 1, 2

TEXT = """\
# HELP nv_inference_request_success Number of successful inference requests, all batch sizes
# TYPE nv_inference_request_success counter
nv_inference_request_success{model="digits",version="1"} 17
# HELP nv_inference_request_failure Number of failed inference requests, all batch sizes
# TYPE nv_inference_request_failure counter
nv_inference_request_failure{model="digits",reason="OTHER",version="1"} 1
nv_inference_request_failure{model="digits",reason="BACKEND",version="1"} 2
nv_inference_request_failure{model="digits",reason="CANCELED",version="1"} 4
nv_inference_request_failure{model="digits",reason="REJECTED",version="1"} 8
# HELP nv_inference_count Number of inferences performed (does not include cached requests)
# TYPE nv_inference_count counter
nv_inference_count{model="digits",version="1"} 32
# HELP nv_inference_exec_count Number of model executions performed (does not include cached requests)
# TYPE nv_inference_exec_count counter
nv_inference_exec_count{model="digits",version="1"} 17
# HELP nv_inference_request_duration_us Cumulative inference request duration in microseconds (includes cached requests)
# TYPE nv_inference_request_duration_us counter
nv_inference_request_duration_us{model="digits",version="1"} 199752
# HELP nv_inference_queue_duration_us Cumulative inference queuing duration in microseconds (includes cached requests)
# TYPE nv_inference_queue_duration_us counter
nv_inference_queue_duration_us{model="digits",version="1"} 55688
# HELP nv_inference_pending_request_count Instantaneous number of pending requests awaiting execution per-model.
# TYPE nv_inference_pending_request_count gauge
nv_inference_pending_request_count{model="digits",version="1"} 3
# HELP nv_pinned_memory_pool_total_bytes Pinned memory pool total memory size, in bytes
# TYPE nv_pinned_memory_pool_total_bytes gauge
nv_pinned_memory_pool_total_bytes 268435456
# HELP nv_cpu_utilization CPU utilization rate [0.0 - 1.0]
# TYPE nv_cpu_utilization gauge
nv_cpu_utilization 0.9950248756218906
"""
"""What a Triton 2.51 with the model digits answered, shortened; the counts of failures are changed to tell them apart."""

READ = Counters(
    succeeded=17,
    failed=3,
    cancelled=4,
    rejected=8,
    pending=3,
    request_microseconds=199752,
    queue_microseconds=55688,
    executions=17,
)


def test_triton_text_is_read_with_what_waited_in_vain_apart_from_failures() -> None:
    assert parse_counters(TEXT, "digits", 1) == READ


def test_other_models_and_versions_do_not_count() -> None:
    others = TEXT.replace('"digits"', '"digits-2"') + TEXT.replace('version="1"', 'version="11"')
    assert parse_counters(others + TEXT, "digits", 1) == READ


def test_lines_of_several_gpus_are_added_up() -> None:
    first = TEXT.replace('model="digits"', 'gpu_uuid="GPU-a",model="digits"')
    second = TEXT.replace('model="digits"', 'gpu_uuid="GPU-b",model="digits"')
    assert parse_counters(first + second, "digits", 1).succeeded == 34


def test_a_large_count_in_scientific_notation_is_read() -> None:
    assert parse_counters(TEXT.replace("199752", "1.99752e+09"), "digits", 1).request_microseconds == 1_997_520_000


@pytest.mark.parametrize(
    ("text", "said"),
    [
        pytest.param("", "no nv_inference_request_success, nv_inference_request_failure", id="nothing at all"),
        pytest.param(TEXT.replace('"digits"', '"letters"'), "of model digits, version 1", id="another model only"),
        pytest.param(TEXT.replace('version="1"', 'version="2"'), "of model digits, version 1", id="another version only"),
        pytest.param(
            "".join(line + "\n" for line in TEXT.splitlines() if "pending" not in line),
            "no nv_inference_pending_request_count of model digits, version 1",
            id="an older Triton without the pending gauge",
        ),
        pytest.param(TEXT.replace('version="1"} 17', 'version="1"} secret'), "not in Prometheus' format", id="no number"),
        pytest.param(TEXT.replace('version="1"} 17', 'version="1" 17'), "not in Prometheus' format", id="a brace missing"),
        pytest.param(TEXT.replace('version="1"} 17', 'version="1"} NaN'), "is no number", id="not a number"),
        pytest.param(TEXT.replace('version="1"} 17', 'version="1"} +Inf'), "is no number", id="infinite"),
    ],
)
def test_text_that_cannot_be_used_is_refused_with_what_is_missing(text: str, said: str) -> None:
    with pytest.raises(CountersError, match=said) as caught:
        parse_counters(text, "digits", 1)
    assert "secret" not in str(caught.value)


@given(st.text(), st.integers(0, len(TEXT)))
def test_no_text_breaks_the_parser(noise: str, at: int) -> None:
    try:
        parse_counters(TEXT[:at] + noise + TEXT[at:], "digits", 1)
    except CountersError:
        pass


def counters(succeeded: int = 0, failed: int = 0, cancelled: int = 0, pending: int = 0) -> Counters:
    return Counters(succeeded, failed, cancelled, pending, 1000 * succeeded, 100 * succeeded)


def pod(name: str, version: int, *counts: int) -> PodScrape:
    return PodScrape(name, version, counters(*counts))


def scrape(at: float, *pods: PodScrape, width: float = 0.05) -> Scrape:
    since = NOON + timedelta(seconds=at)
    return Scrape(since, since + timedelta(seconds=width), pods)


BEFORE = scrape(0, pod("a/1", STABLE, 100, 1), pod("b/1", STABLE, 50), pod("c/1", CANARY, 10, 0, 1))
AFTER = scrape(3, pod("a/1", STABLE, 110, 2, 0, 1), pod("b/1", STABLE, 55, 0, 0, 1), pod("c/1", CANARY, 13, 2, 4, 5))


def test_a_difference_adds_up_the_pods_of_each_version() -> None:
    batch = difference(BEFORE, AFTER, CANARY)
    assert batch is not None
    stable = Tally(requests=16, failures=1, failed_executions=1, request_microseconds=15_000, queue_microseconds=1_500)
    assert batch.stable == stable
    assert batch.canary == Tally(
        requests=5, failures=2, failed_executions=1, cancellations=3, request_microseconds=3_000, queue_microseconds=300
    )
    assert (batch.hung, batch.stable_hung) == ((), ()), "requests are pending, and others were completed"
    assert (batch.since, batch.until) == (BEFORE.until, AFTER.until)


@pytest.mark.parametrize(
    ("pods", "hung", "stable_hung"),
    [
        pytest.param(
            [pod("a/1", STABLE, 9), pod("c/1", CANARY, 5), pod("d/1", CANARY, 1, 0, 0, 2), pod("e/1", CANARY, 9)],
            ("d/1",),
            (),
            id="one of three, whatever its siblings answer",
        ),
        pytest.param([pod("c/1", CANARY, 1, 1, 0, 2)], (), (), id="not one that fails"),
        pytest.param([pod("c/1", CANARY, 1, 0, 1, 2)], ("c/1",), (), id="one whose clients give up"),
        pytest.param([pod("c/1", CANARY, 1)], (), (), id="not one without a request"),
        pytest.param([pod("a/1", STABLE, 1, 0, 0, 1), pod("b/1", STABLE, 1)], (), ("a/1",), id="stable's"),
        pytest.param(
            [pod("a/1", STABLE, 1, 0, 0, 1), pod("b/1", STABLE, 2)], (), ("a/1",), id="stable's, though another answers"
        ),
    ],
)
def test_a_pod_hangs_that_has_requests_pending_and_completed_none(
    pods: list[PodScrape], hung: tuple[str, ...], stable_hung: tuple[str, ...]
) -> None:
    before = scrape(0, *(pod(p.pod, p.version, 1) for p in pods))
    batch = difference(before, scrape(3, *pods), CANARY)
    assert batch is not None
    assert (batch.hung, batch.stable_hung) == (hung, stable_hung)


def test_the_order_in_which_pods_were_read_does_not_matter_to_the_sums() -> None:
    assert difference(BEFORE, replace(AFTER, pods=AFTER.pods[::-1]), CANARY) == difference(BEFORE, AFTER, CANARY)


def test_without_stable_pods_the_canary_is_counted_alone() -> None:
    batch = difference(replace(BEFORE, pods=BEFORE.pods[2:]), replace(AFTER, pods=AFTER.pods[2:]), CANARY)
    assert batch is not None
    assert (batch.stable, batch.canary.requests) == (Tally(), 5)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        pytest.param(BEFORE, replace(AFTER, pods=AFTER.pods[1:]), id="a pod went"),
        pytest.param(replace(BEFORE, pods=BEFORE.pods[1:]), AFTER, id="a pod came"),
        pytest.param(BEFORE, replace(AFTER, pods=(pod("a/2", STABLE, 200), *AFTER.pods[1:])), id="a pod restarted"),
        pytest.param(BEFORE, replace(AFTER, pods=(pod("a/1", STABLE, 3), *AFTER.pods[1:])), id="successes went back"),
        pytest.param(BEFORE, replace(AFTER, pods=(pod("a/1", STABLE, 110, 0), *AFTER.pods[1:])), id="failures went back"),
        pytest.param(BEFORE, replace(AFTER, pods=(*AFTER.pods[:2], pod("c/1", CANARY, 13, 2))), id="cancellations went back"),
        pytest.param(BEFORE, replace(AFTER, pods=(pod("a/1", CANARY, 110, 2), *AFTER.pods[1:])), id="a pod changed its version"),
        pytest.param(replace(BEFORE, since=BEFORE.until - 2 * MAX_SKEW), AFTER, id="the first look took too long"),
        pytest.param(BEFORE, replace(AFTER, since=AFTER.until - 2 * MAX_SKEW), id="the second look took too long"),
    ],
)
def test_no_difference_is_made_where(before: Scrape, after: Scrape) -> None:
    assert difference(before, after, CANARY) is None


BATCHES = st.lists(st.tuples(*[st.integers(0, 1000)] * 6), min_size=1, max_size=8)


@given(BATCHES, st.integers(0, 8))
def test_whatever_pods_do_no_request_is_invented(looks: list[tuple[int, ...]], restart: int) -> None:
    """Batches over any looks, one pod restarting in between, never sum up to more than was served."""
    total, scrapes, base = [0] * 6, [], [0] * 6
    for number, grown in enumerate(looks):
        total = [t + g for t, g in zip(total, grown, strict=True)]
        if number == restart:
            base[:3] = total[:3]
        stable = counters(*(t - b for t, b in zip(total[:3], base[:3], strict=True)))
        scrapes.append(scrape(3 * number, PodScrape("a", STABLE, stable), PodScrape("c", CANARY, counters(*total[3:]))))
    batches = [b for b in map(difference, scrapes, scrapes[1:], [CANARY] * len(scrapes)) if b is not None]
    assert sum(b.stable.failures for b in batches) <= total[1]
    assert sum(b.canary.requests for b in batches) <= total[3] + total[4]
    for batch in batches:
        assert 0 <= batch.canary.failures <= batch.canary.requests
        assert 0 <= batch.stable.failures <= batch.stable.requests


def totals(at: float, **counts: float) -> Totals:
    start: dict[str, Any] = {"stable_requests": 1000.0, "stable_failures": 10.0, "canary_requests": 100.0, "canary_failures": 5.0}
    return Totals(NOON + timedelta(seconds=at), **(start | counts))


def test_counters_of_prometheus_become_a_batch() -> None:
    batch = counter_batch(totals(0), totals(3, stable_requests=1090.0, canary_requests=110.4, canary_failures=7.0))
    assert batch is not None
    assert (batch.stable, batch.canary) == (Tally(requests=90), Tally(requests=10, failures=2))
    assert (batch.since, batch.until) == (NOON, NOON + timedelta(seconds=3))


@pytest.mark.parametrize(
    "after",
    [
        pytest.param(totals(3, stable_requests=10.0, stable_failures=0.0), id="stable's counter was reset"),
        pytest.param(totals(3, canary_requests=20.0, canary_failures=0.0), id="the canary's counter was reset"),
        pytest.param(totals(3, canary_failures=4.0), id="failures went back"),
        pytest.param(totals(3, canary_requests=math.nan), id="a value is not a number"),
        pytest.param(totals(3, stable_requests=math.inf), id="a value is infinite"),
    ],
)
def test_no_batch_is_made_of_prometheus_counters_where(after: Totals) -> None:
    assert counter_batch(totals(0), after) is None


def test_more_failures_than_requests_are_said_to_be_a_mistake_in_the_queries() -> None:
    with pytest.raises(CountersError, match="must count failed ones too"):
        counter_batch(totals(0), totals(3, canary_failures=101.0))


def test_a_failure_counted_before_its_request_is_not_more_than_all() -> None:
    batch = counter_batch(totals(0), totals(3, canary_requests=101.0, canary_failures=7.0))
    assert batch is not None
    assert batch.canary == Tally(requests=2, failures=2)


def test_an_ensembles_failures_are_those_of_its_models_once_and_a_bad_picture_is_none() -> None:
    """What Triton 2.51 told after 6 answers, 2 pictures that cannot be read, and 1 failure of the network.

    triton core#377: cancellations of ensembles are counted as OTHER.
    """
    lines = [
        'nv_inference_request_success{model="m",version="1"} 6',
        'nv_inference_request_success{model="m-preprocess",version="1"} 9',
        'nv_inference_request_success{model="m-network",version="1"} 6',
        'nv_inference_request_failure{model="m",reason="OTHER",version="1"} 6',
        'nv_inference_request_failure{model="m-preprocess",reason="BACKEND",version="1"} 0',
        'nv_inference_request_failure{model="m-network",reason="BACKEND",version="1"} 1',
        'nv_inference_request_failure{model="m-network",reason="CANCELED",version="1"} 2',
        'nv_inference_pending_request_count{model="m",version="1"} 0',
        'nv_inference_pending_request_count{model="m-network",version="1"} 4',
        'nv_inference_request_duration_us{model="m",version="1"} 700',
        'nv_inference_request_duration_us{model="m-network",version="1"} 500',
        'nv_inference_queue_duration_us{model="m",version="1"} 11',
        'nv_inference_queue_duration_us{model="m-preprocess",version="1"} 20',
        'nv_inference_queue_duration_us{model="m-network",version="1"} 30',
    ]
    found = parse_counters("\n".join(lines) + "\n", "m", 1)
    assert found == Counters(6, 1, 2, 4, 700, 50)


# --- executions --------------------------------------------------------------------------------------------------------------


@given(
    batches=st.lists(st.tuples(st.integers(1, 32), st.booleans()), max_size=40),
    apart=st.integers(0, 40),
)
def test_executions_that_failed_are_never_counted_too_high_and_the_largest_never_too_low(
    batches: list[tuple[int, bool]], apart: int
) -> None:
    """Whatever batches Triton formed, each failing as a whole or not, beside requests that were executed alone."""
    executed = [*batches, *[(1, False)] * apart]
    requests, failures = sum(n for n, _ in executed), sum(n for n, failed in executed if failed)
    grown = Counters(requests - failures, failures, 0, 0, 0, 0, 0, len(executed))
    before, after = (Scrape(NOON, NOON, (PodScrape("c/1", CANARY, c),)) for c in (Counters(0, 0, 0, 0, 0, 0), grown))
    batch = difference(before, after, CANARY)
    assert batch is not None
    assert batch.canary.failed_executions <= sum(failed for _, failed in executed)
    assert bool(batch.canary.failed_executions) == bool(failures)
    if executed:
        assert batch.largest is not None
        assert batch.largest >= max(n for n, _ in executed)
    if all(n == 1 for n, _ in executed):
        assert batch.canary.failed_executions == failures, "requests that were executed alone are told exactly"
