"""Language models that write prompts: behind an OpenAI-compatible URL, or a local transformers folder."""

from __future__ import annotations

import os
from typing import Any

from magicid import recipe
from magicid.errors import RecipeError
from magicid.prompts import Ask

_RETRIES = 4  # of the client, with growing waits
_TIMEOUT_S = 120.0
_NEW_TOKENS = 2048


def openai_model(settings: recipe.Prompts) -> Ask:
    """A model behind an OpenAI-compatible server; the key is OPENAI_API_KEY, where the server wants one.

    Raises:
        RecipeError: `url` or `model` is empty; on asking: the server cannot be reached or refuses.
    """
    if not settings.url or not settings.model:
        raise RecipeError("prompts.source = openai needs prompts.url and prompts.model", "set both")
    import openai

    client = openai.OpenAI(
        base_url=settings.url,
        api_key=os.environ.get("OPENAI_API_KEY", "none"),
        max_retries=_RETRIES,
        timeout=_TIMEOUT_S,
    )

    def ask(request: str, seed: int) -> str:
        try:
            answer = client.chat.completions.create(
                model=settings.model, messages=[{"role": "user", "content": request}], temperature=1.0, seed=seed
            )
        except openai.OpenAIError as error:
            raise RecipeError(
                f"prompts.url {settings.url} failed: {error}", "check the URL, the model name and OPENAI_API_KEY"
            ) from error
        return (answer.choices[0].message.content if answer.choices else None) or ""

    return ask


def transformers_model(settings: recipe.Prompts) -> Ask:
    """A causal language model from a local folder (safetensors), asked through its chat template where it has one.

    Raises:
        RecipeError: the folder cannot be loaded.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(settings.model, local_files_only=True)
        model: Any = AutoModelForCausalLM.from_pretrained(
            settings.model, local_files_only=True, use_safetensors=True, dtype="auto"
        )
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise RecipeError(
            f"prompts.model {settings.model!r} is not a language model folder: {error}",
            "set prompts.model to a folder that AutoModelForCausalLM loads, with safetensors weights",
        ) from error
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model.eval().to(device)

    def ask(request: str, seed: int) -> str:
        if tokenizer.chat_template:
            messages = [{"role": "user", "content": request}]
            inputs = tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
            )
        else:
            inputs = tokenizer(request, return_tensors="pt")
        inputs = inputs.to(device)
        limit = getattr(model.config, "max_position_embeddings", None) or _NEW_TOKENS
        new_tokens = min(_NEW_TOKENS, limit - inputs["input_ids"].shape[1])
        if new_tokens < 1:
            raise RecipeError(f"{settings.model} reads only {limit} tokens", "use a model with a longer context")
        with torch.random.fork_rng(), torch.no_grad():
            torch.manual_seed(seed)
            output = model.generate(
                input_ids=inputs["input_ids"],
                attention_mask=inputs["attention_mask"],
                do_sample=True,
                max_new_tokens=new_tokens,
                pad_token_id=tokenizer.pad_token_id or 0,
            )
        return str(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))

    return ask
