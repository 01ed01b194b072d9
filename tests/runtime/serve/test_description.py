"""The server keeps to its own description; run by `make test-slow`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import content_type_conformance, response_schema_conformance

from n3c.runtime.serve.http_server import HttpServer
from support.serving_http import listening, scripted_served
from support.small_tokenizer import VOCAB

CHECKS = (HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large, HealthCheck.large_base_example)


@pytest.fixture(scope="module")
def server(built: Path) -> Iterator[HttpServer]:
    def model(tokens: Any) -> Any:
        logits = np.zeros(VOCAB, np.float32)
        logits[30 + (len(tokens) * 7 + int(tokens[-1])) % 90] = 9
        return logits

    with listening(scripted_served(built / "weights", model, context=200)) as running:
        yield running


@pytest.mark.slow
def test_the_server_keeps_to_its_description(server: HttpServer) -> None:
    """Schemathesis makes right and wrong requests of the OpenAPI document; every answer is as described."""
    schema: Any = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
    statuses: Counter[int] = Counter()

    def check(case: Any) -> None:
        if isinstance(case.body, dict) and "model" in case.body and statuses.total() % 2:
            case.body["model"] = "small"  # else nearly all are refused for their model
        answer = case.call(timeout=60)
        statuses[answer.status_code] += 1
        streamed = "event-stream" in "".join(answer.headers.get("content-type", []))
        checks = [not_a_server_error, content_type_conformance, *([] if streamed else [response_schema_conformance])]
        case.validate_response(answer, checks=checks)

    for operation in schema.get_all_operations():
        limits = settings(max_examples=40, suppress_health_check=CHECKS)
        limits(given(case=operation.ok().as_strategy())(check))()
    print(dict(statuses))
    assert statuses[200] > 5 and statuses[400] > 5
    assert httpx.get(f"{server.url}/health").status_code == 200
    assert server.served.service.scheduler.idle
