"""What a client gets: text and ids, streamed or whole, over gRPC and over HTTP."""

from __future__ import annotations

import asyncio
import http.client
import json
from typing import Any

from tests.serving.reference import MAX_NEAR_TIES, Reference
from tests.serving.running_server import PROMPT, RunningServer

from quire_client import AsyncClient, Client, GenerateResult

NUM_STREAMS = 256
TOKENS_PER_STREAM = 32
OPENINGS = (
    "Once upon a time",
    "The little fox",
    "Question: What",
    "Dear friend,",
    "In the morning",
    "One day",
)
NAMES = ("Anna", "Ben", "Clara", "Dan", "Ella", "Finn", "Grace", "Hugo", "Ida", "Jack", "Kate", "Leo")


def prompts(count: int) -> list[str]:
    """Different prompts of different lengths, some of which share their beginning."""
    return [
        f"{OPENINGS[number % len(OPENINGS)]} {' and '.join(NAMES[: 1 + number % 11])} {number}"
        for number in range(count)
    ]


def post(server: RunningServer, path: str, body: dict[str, Any]) -> tuple[int, str]:
    """Status and body of a POST to the model `llm`."""
    connection = http.client.HTTPConnection("127.0.0.1", server.ports.http, timeout=60)
    try:
        connection.request("POST", f"/v2/models/llm/{path}", json.dumps(body))
        answer = connection.getresponse()
        return answer.status, answer.read().decode()
    finally:
        connection.close()


async def stream_all(url: str, prompts: list[str]) -> list[GenerateResult]:
    async with AsyncClient(url, timeout_s=250) as client:
        streams = [client.stream(prompt, max_tokens=TOKENS_PER_STREAM, temperature=0) for prompt in prompts]
        return await asyncio.gather(*(stream.result() for stream in streams))


def test_256_concurrent_greedy_streams_give_the_text_of_transformers_and_of_each_alone(
    server: RunningServer, client: Client, reference: Reference
) -> None:
    asked = prompts(NUM_STREAMS)
    together = asyncio.run(stream_all(server.ports.grpc_url, asked))
    near_ties = tokens = 0
    for prompt, result in zip(asked, together, strict=True):
        agreement = reference.compare(reference.encode(prompt), result.token_ids)
        assert agreement.wrong == (), f"{prompt!r} continued with {result.token_ids}"
        assert result.text == reference.decode(result.token_ids)
        assert result.num_output_tokens == len(result.token_ids)
        near_ties += agreement.near_ties
        tokens += agreement.tokens
        if agreement.near_ties == 0:
            alone = client.generate(prompt, max_tokens=TOKENS_PER_STREAM, temperature=0)
            if alone != result:
                # Alone, a near tie may fall the other way; everything else may not.
                assert reference.compare(reference.encode(prompt), alone.token_ids).near_ties > 0, prompt
    assert tokens > NUM_STREAMS
    assert near_ties <= max(1, tokens * MAX_NEAR_TIES)


def test_deltas_add_up_to_what_is_returned_whole(client: Client) -> None:
    whole = client.generate(PROMPT, max_tokens=40, temperature=0)
    stream = client.stream(PROMPT, max_tokens=40, temperature=0)
    deltas = list(stream)
    assert len(deltas) > 1
    assert "".join(delta.text for delta in deltas) == whole.text
    assert [token for delta in deltas for token in delta.token_ids] == list(whole.token_ids)
    assert all(delta.token_ids for delta in deltas)
    assert stream.result() == whole


def test_the_prompt_is_in_the_text_only_when_asked_for(client: Client, server: RunningServer) -> None:
    plain = client.generate(PROMPT, max_tokens=4, temperature=0)
    echoed = client.generate(PROMPT, max_tokens=4, temperature=0, exclude_input_in_output=False)
    assert echoed.text == PROMPT + plain.text
    assert echoed.token_ids == plain.token_ids
    body = {"text_input": PROMPT, "max_tokens": 4, "temperature": 0}
    assert json.loads(post(server, "generate", body)[1])["text_output"] == echoed.text
    _, events = post(server, "generate_stream", body | {"stream": True})
    assert "".join(json.loads(event)["text_output"] for event in data_of(events)) == plain.text


def test_ids_and_text_are_the_same_prompt(client: Client, reference: Reference) -> None:
    by_text = client.generate(PROMPT, max_tokens=16, temperature=0)
    by_ids = client.generate(reference.encode(PROMPT), max_tokens=16, temperature=0)
    assert by_ids == by_text
    assert by_text.num_input_tokens == len(reference.encode(PROMPT))


def test_http_generate_answers_with_one_object(server: RunningServer, client: Client) -> None:
    body = {"text_input": PROMPT, "max_tokens": 20, "temperature": 0, "exclude_input_in_output": True}
    status, answer = post(server, "generate", body)
    expected = client.generate(PROMPT, max_tokens=20, temperature=0)
    found = json.loads(answer)
    assert status == 200
    assert found["text_output"] == expected.text
    assert found["output_ids"] == list(expected.token_ids)
    assert found["finish_reason"] == expected.finish_reason
    assert found["num_output_tokens"] == expected.num_output_tokens


def test_http_generate_stream_sends_events_that_add_up(server: RunningServer, client: Client) -> None:
    body = {"text_input": PROMPT, "max_tokens": 20, "temperature": 0, "stream": True}
    status, answer = post(server, "generate_stream", body)
    events = [json.loads(event) for event in data_of(answer)]
    expected = client.generate(PROMPT, max_tokens=20, temperature=0)
    assert status == 200
    assert "".join(event["text_output"] for event in events) == expected.text
    assert [event.get("finish_reason") for event in events] == [None] * (len(events) - 1) + ["length"]
    assert events[-1]["num_output_tokens"] == 20


def data_of(events: str) -> list[str]:
    """The payloads of server-sent events."""
    return [line.removeprefix("data: ") for line in events.splitlines() if line.startswith("data: ")]


def test_a_stop_string_ends_the_text_before_it(client: Client) -> None:
    whole = client.generate(PROMPT, max_tokens=40, temperature=0).text
    stop = whole[len(whole) // 2 :][:5]
    expected = whole[: whole.index(stop)]
    for result in (
        client.generate(PROMPT, max_tokens=40, temperature=0, stop=[stop, "never seen"]),
        client.stream(PROMPT, max_tokens=40, temperature=0, stop=[stop]).result(),
    ):
        assert result.text == expected
        assert result.finish_reason == "stop"
        assert result.num_output_tokens < 40


def test_what_may_begin_a_stop_string_is_sent_once_it_does_not(client: Client) -> None:
    whole = client.generate(PROMPT, max_tokens=40, temperature=0).text
    almost = whole[len(whole) // 2 :][:5] + "\0"
    assert client.stream(PROMPT, max_tokens=40, temperature=0, stop=[almost]).result().text == whole


def test_a_seed_makes_sampling_reproducible_alone_and_in_a_crowd(
    server: RunningServer, client: Client
) -> None:
    options = {"max_tokens": 24, "temperature": 1.0, "top_p": 0.95}
    alone = client.generate(PROMPT, seed=7, **options)  # type: ignore[arg-type]

    async def crowd() -> list[GenerateResult]:
        async with AsyncClient(server.ports.grpc_url, timeout_s=120) as client:
            return await asyncio.gather(
                *(client.generate(PROMPT, seed=seed, **options) for seed in [*range(32), 7])  # type: ignore[arg-type]
            )

    results = asyncio.run(crowd())
    assert results[-1] == results[7] == alone
    assert len({result.token_ids for result in results}) > 8


def test_without_a_seed_sampling_varies(client: Client) -> None:
    results = {client.generate(PROMPT, max_tokens=16, temperature=1.5).token_ids for _ in range(8)}
    assert len(results) > 1


def test_the_default_is_16_tokens(client: Client) -> None:
    result = client.generate(PROMPT)
    assert result.num_output_tokens == 16 or result.finish_reason == "stop"


def test_a_text_fills_the_model_to_its_limit_and_ends_with_length(
    client: Client, reference: Reference
) -> None:
    prompt = reference.encode("and then " * 2000)[:2047]
    result = client.generate(prompt, max_tokens=1, temperature=0)
    assert (result.finish_reason, result.num_input_tokens, result.num_output_tokens) == ("length", 2047, 1)
    assert reference.compare(prompt, result.token_ids).wrong == ()


def test_multi_byte_characters_are_never_split(client: Client) -> None:
    stream = client.stream("naïve café 日本語 😀 ", max_tokens=64, temperature=2.0, seed=3)
    text = "".join(delta.text for delta in stream)
    assert text == stream.result().text
    whole = client.generate("naïve café 日本語 😀 ", max_tokens=64, temperature=2.0, seed=3)
    assert text == whole.text
