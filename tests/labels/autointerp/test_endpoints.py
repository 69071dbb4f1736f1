"""`OpenAIClient` at a server that refuses settings, cuts answers off, or counts tokens in a way of its own."""

import json
import logging
from dataclasses import replace

import pytest
from labeling_made import KEY, PAID, Oracle

from saelab.labels.autointerp.clients import Answer, LocalClient, NotAnswered, RetryLater, StructuredClient
from saelab.labels.autointerp.endpoints import N_REASONING, OpenAIClient, name_endpoint
from saelab.labels.autointerp.prompts import LABEL_SCHEMA, flags_schema, read_flags, read_strengths, strengths_schema
from saelab.labels.autointerp.requests import FAILURES, Question, RequestConfig, RequestQueue
from saelab.labels.autointerp.response_cache import AnswerLog
from saelab.lm import tiny_model

FAST = RequestConfig(wait=0.01, longest_wait=1.0)
NEW_LIMIT = {
    "message": "Unsupported parameter: 'max_tokens' is not supported with this model. Use 'max_completion_tokens'.",
    "type": "invalid_request_error", "param": "max_tokens", "code": "unsupported_parameter",
}  # fmt: skip
ONE_TEMPERATURE = {
    "message": "Unsupported value: 'temperature' does not support 0 with this model. Only the default (1) is.",
    "type": "invalid_request_error", "param": "temperature", "code": "unsupported_value",
}  # fmt: skip
NO_SCHEMA = {"message": "This response_format type is unavailable now", "type": "invalid_request_error", "param": None}


class Plain(Oracle):
    """Says yes in four ways, whatever it is asked."""

    def say(self, prompt: str) -> str:
        return "[1, 1, 1, 1]"


def make_questions(n: int = 4, **options) -> list[Question]:
    return [
        Question(
            messages=[{"role": "user", "content": f"question {i}"}],
            read=lambda text: read_flags(text, 4, (0, 1)),
            schema=flags_schema(4, (0, 1)),
            **options,
        )
        for i in range(n)
    ]


def ask(client, path, questions=None, **options):
    queue = RequestQueue(client, path, replace(FAST, **options), progress=False)
    return queue, queue.ask(make_questions() if questions is None else questions)


@pytest.fixture
def start(serve):
    """Starts a server that says yes, and a client of it."""

    def begin(plan=("ok",), **options):
        server, client = serve(plan, **options)
        server.oracle = Plain()
        return server, client

    return begin


@pytest.mark.parametrize("fault", PAID)
def test_an_answer_that_is_none_is_billed_and_not_asked_for_again(start, tmp_path, fault) -> None:
    """Of 4 prompts, 4 requests are sent, whose tokens the budget sees; the next run sends none."""
    server, client = start((f"always {fault}",))
    queue, replies = ask(client, tmp_path / "a.jsonl", price_in=1e6, price_out=1e6, budget=1e9)
    usage = PAID[fault].get("usage", server.usage)
    assert len(server.bodies) == 4 and all(reply.value is None and not reply.is_waiting for reply in replies)
    assert (queue.usage.n_requests, queue.usage.n_unusable, queue.usage.n_retries) == (4, 4, 0)
    assert queue.usage.tokens_in == 4 * usage["prompt_tokens"]
    assert queue.usage.tokens_out == 4 * usage["completion_tokens"]
    assert queue.usage.cost == queue.usage.tokens_in + queue.usage.tokens_out
    assert "4 answers were empty, cut off or withheld" in str(queue.usage)
    again, kept = ask(client, tmp_path / "a.jsonl")
    assert kept == replies and again.usage.n_kept == 4 and again.usage.n_requests == 0 and len(server.bodies) == 4
    assert KEY not in (tmp_path / "a.jsonl").read_text() + str(replies)


def test_a_cut_answer_says_what_to_do_and_more_is_another_request(start, tmp_path) -> None:
    server, client = start(("always reasoned",))
    _, replies = ask(client, tmp_path / "a.jsonl")
    assert "512 of them reasoning" in replies[0].problem and "`max_tokens` (512)" in replies[0].problem
    server.plan = ("ok",)
    server.faults.clear()
    longer = OpenAIClient("right", server.url, settings={"max_tokens": 4096})
    _, replies = ask(longer, tmp_path / "a.jsonl")
    longer.close()
    assert [reply.value for reply in replies] == [[1, 1, 1, 1]] * 4 and server.bodies[-1]["max_tokens"] == 4096


def test_answers_that_are_never_usable_end_the_run(start, tmp_path) -> None:
    server, client = start(("always reasoned",))
    with pytest.raises(ConnectionError, match=rf"no usable answer to {FAILURES} prompts in a row \(it was cut off"):
        ask(client, tmp_path / "a.jsonl", make_questions(50), n_parallel=1)
    assert len(server.bodies) == FAILURES == len(AnswerLog(tmp_path / "a.jsonl"))


def test_the_budget_makes_room_for_what_answers_turn_out_to_take(start, tmp_path) -> None:
    """A question of 10 tokens that takes 512: from the second prompt on so many are set aside."""
    _, client = start(("always reasoned",))
    queue, replies = ask(
        client, tmp_path / "a.jsonl", make_questions(9, tokens_out=10), n_parallel=1, price_in=0.0, price_out=1e6,
        budget=3 * 512.0 + 100,
    )  # fmt: skip
    assert queue.usage.cost == 3 * 512.0 and "budget" in queue.usage.stopped and replies[3].is_waiting


@pytest.mark.parametrize(
    ("usage", "counted"),
    [
        ({"prompt_tokens": 50, "completion_tokens": 5, "total_tokens": 300}, (50, 250)),  # reasoning in the total alone
        ({"prompt_tokens": 50, "completion_tokens": 5, "total_tokens": 55}, (50, 5)),
        ({"prompt_tokens": None, "completion_tokens": "5"}, (0, 0)),
        (None, (0, 0)),
    ],
)
def test_usage_is_read_as_servers_give_it(start, usage, counted) -> None:
    server, client = start()
    server.usage = usage
    found = client.complete([{"role": "user", "content": "x"}])
    assert (found.tokens_in, found.tokens_out) == counted and found.text == "[1, 1, 1, 1]" and not found.problem


def test_without_usage_an_estimate_is_billed_of_a_cut_answer_its_limit(start, tmp_path) -> None:
    server, client = start(("ok", "always stopped"))
    server.usage = None
    queue, _ = ask(client, tmp_path / "a.jsonl", make_questions(2))
    assert queue.usage.tokens_out == 512 + 4 + int(len('{"answers": [1, 1, 1, 1]}') / 3.5)
    assert queue.usage.tokens_in > 0


def test_what_the_model_refuses_is_found_out_once(start, tmp_path, caplog) -> None:
    server, client = start()
    server.refused = {"max_tokens": NEW_LIMIT, "temperature": ONE_TEMPERATURE, "response_format": NO_SCHEMA}
    with caplog.at_level(logging.WARNING):
        queue, replies = ask(client, tmp_path / "a.jsonl", make_questions(8), n_parallel=1)
    assert [reply.value for reply in replies] == [[1, 1, 1, 1]] * 8 and len(server.bodies) == 8 + 3
    last = server.bodies[-1]
    assert {*last} == {"model", "messages", "max_completion_tokens"} and last["max_completion_tokens"] == N_REASONING
    said = [record.getMessage() for record in caplog.records]
    assert (
        len(said) == 3 and sum("max_tokens: from now on it is sent under its other name" in line for line in said) == 1
    )
    assert queue.usage.n_requests == 8 and queue.usage.n_retries == 0
    entry = json.loads((tmp_path / "a.jsonl").read_text().splitlines()[0])
    assert entry["settings"] == dict(client.settings), "cached under what was asked for, which a new client asks too"
    fresh = OpenAIClient("right", server.url)
    _, kept = ask(fresh, tmp_path / "a.jsonl", make_questions(8))
    fresh.close()
    assert kept == replies and len(server.bodies) == 11


def test_threads_that_are_refused_together_find_out_together(start, tmp_path) -> None:
    server, client = start()
    server.delay = 0.02
    server.refused = {"max_tokens": NEW_LIMIT, "temperature": ONE_TEMPERATURE}
    _, replies = ask(client, tmp_path / "a.jsonl", make_questions(12), n_parallel=4)
    assert all(reply.value for reply in replies) and len(server.bodies) <= 12 + 2 * 4


@pytest.mark.parametrize(
    ("name", "error"),
    [
        ("max_tokens", {"message": "[{'type': 'extra_forbidden', 'loc': ['body', 'max_tokens']}]", "status": 422}),
        ("temperature", {"detail": "Unexpected fields in the request: {'temperature'}", "status": 422}),
        ("temperature", {"message": "`temperature` is deprecated for this model."}),
        ("temperature", {"message": "Unrecognized request argument supplied: temperature"}),
        ("response_format", {"message": "Failed to parse grammar", "status": 500}),
        ("response_format", {"message": "Invalid schema for response_format 'answer'", "param": "response_format"}),
    ],
)
def test_refusals_of_other_servers_are_understood(start, tmp_path, name, error) -> None:
    server, client = start()
    server.refused = {name: error}
    _, replies = ask(client, tmp_path / "a.jsonl", make_questions(2), n_parallel=1)
    assert all(reply.value for reply in replies) and len(server.bodies) == 3 and name not in server.bodies[-1]


@pytest.mark.parametrize(
    "message",
    [
        "This model's maximum context length is 8192 tokens. However, you requested 8300 tokens (7800 in the messages, "
        "512 in max_tokens). Please reduce the length of the messages.",
        "Your input violates our policy at temperature 0.",
    ],
)
def test_a_prompt_that_is_refused_costs_no_setting(start, message) -> None:
    server, client = start()
    server.refused = {"messages": {"message": message, "param": "messages", "code": "context_length_exceeded"}}
    with pytest.raises(NotAnswered, match="400"):
        client.complete([{"role": "user", "content": "x"}])
    server.refused = {}
    client.complete([{"role": "user", "content": "x"}])
    assert len(server.bodies) == 2 and {"max_tokens", "temperature"} <= {*server.bodies[-1]}


def test_what_the_caller_set_is_sent_or_the_run_ends(start, tmp_path) -> None:
    server, client = start(settings={"temperature": 0.5, "max_tokens": 99, "top_k": 1})
    server.refused = {"max_tokens": NEW_LIMIT}
    ask(client, tmp_path / "a.jsonl", make_questions(1))
    assert (server.bodies[-1]["max_completion_tokens"], server.bodies[-1]["top_k"]) == (99, 1), "the limit that was set"
    server.refused["temperature"] = ONE_TEMPERATURE
    with pytest.raises(ValueError, match=r"take the setting `temperature`, got 400.*by None"):
        ask(client, tmp_path / "b.jsonl", make_questions(1))
    _, without = start(settings={"temperature": None, "max_completion_tokens": 7}, structured=False)
    assert {*without.settings} == {"model", "endpoint", "structured", "max_completion_tokens"}
    assert not isinstance(LocalClient, StructuredClient) and isinstance(without, StructuredClient)


def test_a_model_without_any_limit_of_tokens_is_not_asked(start, tmp_path) -> None:
    server, client = start()
    other = NEW_LIMIT | {"message": "unsupported", "param": "max_completion_tokens"}
    server.refused = {"max_tokens": NEW_LIMIT, "max_completion_tokens": other}
    with pytest.raises(ValueError, match="take the setting `max_completion_tokens`"):
        ask(client, tmp_path / "a.jsonl", make_questions(1))
    assert len(server.bodies) == 2


def test_answers_follow_their_schema_where_the_server_can(start, tmp_path) -> None:
    server, client = start()
    _, replies = ask(client, tmp_path / "a.jsonl")
    assert [reply.value for reply in replies] == [[1, 1, 1, 1]] * 4
    assert '{"answers": [1, 1, 1, 1]}' in json.loads((tmp_path / "a.jsonl").read_text().splitlines()[0])["answer"]
    assert all(body["response_format"]["type"] == "json_schema" for body in server.bodies)
    _, plain = start(structured=False)
    assert plain.complete_as([{"role": "user", "content": "x"}], LABEL_SCHEMA).text == "[1, 1, 1, 1]"


def test_what_follows_a_schema_is_read() -> None:
    items = strengths_schema(3)["properties"]["strengths"]["items"]
    assert items["required"] == ["token", "strength"] and items["additionalProperties"] is False
    assert read_strengths('{"strengths": [{"token": 1, "strength": 8}]}', 3) == [0.0, 8.0, 0.0]
    assert read_strengths('{"strengths": []}', 2) == [0.0, 0.0]
    for bad in ('[{"token": 3, "strength": 8}]', "[7]", '[{"token": true, "strength": 8}]', '[{"token": 0}]'):
        with pytest.raises(ValueError, match="must be an object of token numbers"):
            read_strengths(f'{{"strengths": {bad}}}', 3)


def test_two_endpoints_share_no_answer(start, tmp_path) -> None:
    path = tmp_path / "a.jsonl"
    (one, client), (other, its_client) = start(), start()
    ask(client, path)
    ask(its_client, path)
    assert len(one.bodies) == len(other.bodies) == 4 and len(AnswerLog(path)) == 8
    assert client.settings["endpoint"] != its_client.settings["endpoint"]
    assert "127.0.0.1" not in path.read_text(), "where a server is, is nobody's business"
    with_password = OpenAIClient("right", one.url.replace("127", "ada:hunter2@127") + "/")
    queue, _ = ask(with_password, path)
    with_password.close()
    assert queue.usage.n_kept == 4, "the same place"
    assert name_endpoint("http://h/v1?key=a") == name_endpoint("http://h/v1") != name_endpoint("http://h/v2")


def test_an_address_in_the_environment_is_another_endpoint(monkeypatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    names = []
    for address in ("http://127.0.0.1:9/v1", "http://127.0.0.1:10/v1"):
        monkeypatch.setenv("OPENAI_BASE_URL", address)
        client = OpenAIClient("m")
        names.append(client.settings["endpoint"])
        assert address in repr(client)
        client.close()
    assert names[0] != names[1]


def test_answers_of_before_that_name_no_endpoint_are_refused_with_a_word(start, tmp_path, caplog) -> None:
    server, client = start()
    path, settings = tmp_path / "a.jsonl", {"model": "right", "temperature": 0, "max_tokens": 512}
    AnswerLog(path).add("old", settings, [{"role": "user", "content": "question 0"}], Answer(text="[0, 0, 0, 0]"), 0.1)
    with caplog.at_level(logging.WARNING):
        _, replies = ask(client, path)
    assert len(server.bodies) == 4 and replies[0].value == [1, 1, 1, 1]
    assert "holds 1 answers of a model named right that do not say which endpoint" in caplog.text
    caplog.clear()
    (tmp_path / "b.jsonl").write_text(path.read_text().replace('"model": "right"', '"model": "another"'))
    ask(client, tmp_path / "b.jsonl", [])
    assert not caplog.text


def test_two_models_of_one_name_on_this_machine_share_no_answer() -> None:
    models = [tiny_model(seed=seed) for seed in (0, 0, 1)]
    models[2].cfg.model_name = models[0].cfg.model_name
    one, same, other = (LocalClient(model).settings for model in models)
    assert one == same != other and one["model"] == other["model"]


def test_a_local_answer_that_was_cut_off_is_none(tmp_path) -> None:
    client = LocalClient(tiny_model(), n_tokens=3)
    queue, replies = ask(client, tmp_path / "a.jsonl", make_questions(1))
    assert (
        "cut off after `n_tokens` (3)" in replies[0].problem and queue.usage.n_requests == queue.usage.n_unusable == 1
    )


def test_only_what_may_have_reached_the_model_is_billed_without_an_answer(start, monkeypatch, tmp_path) -> None:
    server, client = start(("slow",), timeout=0.3)
    with pytest.raises(RetryLater, match="in time") as late:
        client.complete([{"role": "user", "content": "x"}])
    nobody = OpenAIClient("right", "http://127.0.0.1:9/v1")
    with pytest.raises(RetryLater, match="connection failed") as unsent:
        nobody.complete([{"role": "user", "content": "x"}])
    nobody.close()
    assert late.value.billed and not unsent.value.billed and len(server.bodies) == 1
