"""Prompt sets: distinct, complete, and the same shape whether shipped or sampled from a language model."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

from magicid import recipe
from magicid.errors import RecipeError
from magicid.prompts import for_class, load_prompts, sample_texts, shipped, usable
from magicid.recipe import Prompts
from magicid.storage import sha256_json
from magicid.world import language


@pytest.mark.parametrize("name", recipe.shipped())
def test_the_sets_of_the_recipes_hold_20_and_40_different_prompts(name: str) -> None:
    prompts = load_prompts(recipe.load(name).prompts)
    assert [p.split for p in prompts] == ["training"] * 20 + ["heldout"] * 40
    assert len({p.text for p in prompts}) == len({p.prompt_id for p in prompts}) == 60
    assert all(p.text.count("{class_word}") == 1 for p in prompts)
    assert all(p.prompt_id == sha256_json(p.text)[:12] for p in prompts)


def test_the_face_worlds_set_covers_every_action_and_place_without_overlap() -> None:
    prompts = load_prompts(Prompts(name="face-world"))
    combinations = [language.parse(for_class(p.text, "person")) for p in prompts]
    assert len(set(combinations)) == 60
    for start, end in ((0, 8), (0, 20), (20, 60)):  # the first eight training prompts alone cover everything
        actions, places = zip(*combinations[start:end])
        assert set(actions) == set(range(len(language.ACTIONS)))
        assert set(places) == set(range(len(language.PLACES)))
    captions = {language.caption(action, place) for action, place in combinations}
    assert captions == {for_class(p.text, "person") for p in prompts}


def test_the_real_world_set_is_varied() -> None:
    prompts = load_prompts(Prompts(name="human-actions"))
    assert min(len(p.text.split()) for p in prompts) >= 10
    verbs = {re.sub(r".*\{class_word\} (in a \w+ \w+ )?", "", p.text).split()[0] for p in prompts}
    assert len(verbs) >= 40


def test_the_class_word_is_filled_in() -> None:
    assert for_class("a {class_word} nods in the kitchen", "woman") == "a woman nods in the kitchen"
    assert for_class("A {class_word} nods", "old man") == "An old man nods"
    assert for_class("no token", "man") == "no token"


def test_fewer_prompts_are_the_first_ones_and_more_are_refused() -> None:
    whole = load_prompts(Prompts(name="face-world"))
    some = load_prompts(Prompts(name="face-world", training=2, heldout=3))
    assert some == whole[:2] + whole[20:23]
    with pytest.raises(RecipeError, match=r"prompts\.training = 21, but the set face-world has 20"):
        load_prompts(Prompts(name="face-world", training=21))
    with pytest.raises(RecipeError, match="face-wrld") as caught:
        load_prompts(Prompts(name="face-wrld"))
    assert all(name in caught.value.action for name in shipped())


def test_answers_are_read_as_json_or_line_by_line() -> None:
    first, second = "A {class_word} runs up a hill.", "A {class_word} opens the red door."
    assert usable(json.dumps([first, second])) == [first, second]
    assert usable(f"Sure, here they are:\n```json\n{json.dumps([first])}\n```") == [first]
    assert usable(f'1. {first}\n2) "{second}"\n- {first}\nHope that helps!') == [first, second]
    assert usable(json.dumps(["A person runs up a hill."])) == [first]
    unusable = ["A man runs.", "A {class_word} and a {class_word} meet.", "A {name} waves at {class_word}.", "x" * 500]
    assert usable(json.dumps([*unusable, 3])) == []


def test_asking_goes_on_until_there_are_enough_different_ones() -> None:
    requests = []

    def ask(request: str, seed: int) -> str:
        requests.append(request)
        return json.dumps([f"A {{class_word}} does thing number {n // 2}." for n in range(7 * seed, 7 * seed + 20)])

    texts = sample_texts(ask, 22, "model")
    assert len(set(texts)) == len(texts) == 22
    assert texts[0] not in requests[0]
    assert texts[0] in requests[1]  # the model is told what it has said already


class ChatServer(BaseHTTPRequestHandler):
    """Speaks the chat completions protocol; refuses the first request of each test."""

    seen: list[dict[str, Any]]
    answers = True

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.seen.append({"path": self.path, **body})
        count = int(re.search(r"Write (\d+)", body["messages"][0]["content"]).group(1))  # type: ignore[union-attr]
        batch = len(self.seen)
        prompts = [f"A {{class_word}} jumps over puddle {batch} times {n}." for n in range(count)]
        content = json.dumps(prompts) if self.answers else "I cannot help with that."
        message = {"role": "assistant", "content": content}
        choice = {"index": 0, "finish_reason": "stop", "message": message}
        reply = json.dumps({"id": "1", "object": "chat.completion", "created": 0, "model": "m", "choices": [choice]})
        self.send_response(503 if batch == 1 else 200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(reply)))
        self.end_headers()
        self.wfile.write(reply.encode())

    def log_message(self, *_: Any) -> None:
        """Quiet."""


@pytest.fixture
def chat() -> Iterator[tuple[str, type[ChatServer]]]:
    class Handler(ChatServer):
        seen: list[dict[str, Any]] = []  # noqa: RUF012

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/v1", Handler
    server.shutdown()
    thread.join()
    server.server_close()


def test_prompts_come_from_an_openai_compatible_server(chat: tuple[str, type[ChatServer]]) -> None:
    url, handler = chat
    prompts = load_prompts(Prompts(source="openai", url=url, model="writer", training=20, heldout=3))
    assert [p.split for p in prompts] == ["training"] * 20 + ["heldout"] * 3
    assert len({p.text for p in prompts}) == 23
    assert {request["path"] for request in handler.seen} == {"/v1/chat/completions"}
    assert {request["model"] for request in handler.seen} == {"writer"}
    assert len(handler.seen) == 3  # one refused and repeated, then two batches


def test_a_server_that_does_not_answer_well_is_named(chat: tuple[str, type[ChatServer]]) -> None:
    url, handler = chat
    handler.answers = False
    with pytest.raises(RecipeError, match=r"writer gave 0 usable prompts of 2; .*I cannot help"):
        load_prompts(Prompts(source="openai", url=url, model="writer", training=1, heldout=1))
    with pytest.raises(RecipeError, match=r"needs prompts\.url"):
        load_prompts(Prompts(source="openai"))


def test_a_server_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("magicid.prompt_models._RETRIES", 0)
    with pytest.raises(RecipeError, match=r"prompts\.url http://127\.0\.0\.1:9/v1 failed"):
        load_prompts(Prompts(source="openai", url="http://127.0.0.1:9/v1", model="writer"))


def test_a_local_model_that_is_too_weak_or_absent_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from magicid.world.text_encoders import llama_tokenizer

    torch.manual_seed(0)
    tokens = llama_tokenizer(["a", "person", "jumps"])
    tokens.save_pretrained(tmp_path)
    config = LlamaConfig(
        vocab_size=len(tokens), hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1,
        max_position_embeddings=4096, bos_token_id=1, eos_token_id=2, pad_token_id=3,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    monkeypatch.setattr("magicid.prompt_models._NEW_TOKENS", 16)
    with pytest.raises(RecipeError, match="gave 0 usable prompts of 2") as caught:
        load_prompts(Prompts(source="transformers", model=str(tmp_path), training=1, heldout=1))
    assert "stronger" in caught.value.action
    with pytest.raises(RecipeError, match="is not a language model folder"):
        load_prompts(Prompts(source="transformers", model=str(tmp_path / "absent")))


def test_a_local_model_answers_through_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tiny model cannot write prompts, so its generated tokens are replaced; all else is the real path."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from magicid.world.text_encoders import llama_tokenizer

    tokens = llama_tokenizer(["a", "person", "jumps"])
    tokens.chat_template = "{{ messages[0]['content'] }}"
    tokens.save_pretrained(tmp_path)
    config = LlamaConfig(
        vocab_size=len(tokens), hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1,
        max_position_embeddings=4096, bos_token_id=1, eos_token_id=2, pad_token_id=3,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    asked = []

    def generate(self: Any, input_ids: torch.Tensor, **_: Any) -> torch.Tensor:
        asked.append(tokens.decode(input_ids[0], skip_special_tokens=True))
        text = json.dumps(["A {class_word} jumps in the rain.", "A {class_word} runs in the sun."])
        answer = tokens(text, add_special_tokens=False, return_tensors="pt").input_ids
        return torch.cat([input_ids, answer], dim=1)

    monkeypatch.setattr(LlamaForCausalLM, "generate", generate)
    prompts = load_prompts(Prompts(source="transformers", model=str(tmp_path), training=1, heldout=1))
    assert [p.text for p in prompts] == ["A {class_word} jumps in the rain.", "A {class_word} runs in the sun."]
    assert "JSON list of 2 strings" in asked[0]
