#!/usr/bin/env python3
"""Drives a running `winnow serve` with OpenAI's Python client and checks what comes back.

    pip install openai
    build/release/winnow serve MODEL --port 8080 &
    python3 tools/openai_client_check.py http://127.0.0.1:8080 [--api-key KEY]

Prints one line per check; exit 1 if any fails.
"""
import argparse
import math
import sys

import openai

failed = 0


def check(name, condition, detail=""):
    global failed
    failed += 0 if condition else 1
    print(f"{'ok  ' if condition else 'FAIL'} {name}{'' if condition else f': {detail}'}")


def refused(name, expected, call):
    try:
        call()
        check(name, False, "was accepted")
    except openai.APIStatusError as error:
        check(name, isinstance(error, expected), repr(error))


def check_completions(client, model):
    settings = dict(model=model, prompt="The old house", max_tokens=12, seed=7)
    first = client.completions.create(**settings)
    check("completion has usage", first.usage.total_tokens == first.usage.prompt_tokens + first.usage.completion_tokens)
    check("a seed repeats", client.completions.create(**settings).choices[0].text == first.choices[0].text)
    pieces = [chunk.choices[0].text for chunk in client.completions.create(**settings, stream=True)]
    check("a stream adds up", "".join(pieces) == first.choices[0].text, pieces)
    several = client.completions.create(**settings, n=3)
    check("n=3 gives three", [choice.index for choice in several.choices] == [0, 1, 2])
    check("the first of n is that of n=1", several.choices[0].text == first.choices[0].text)
    two = client.completions.create(model=model, prompt=["One", "Two"], max_tokens=2, temperature=0)
    check("two prompts, two choices", len(two.choices) == 2)
    greedy = client.completions.create(model=model, prompt="The old house", max_tokens=24, temperature=0).choices[0].text
    stop = greedy[8:11]
    cut = client.completions.create(model=model, prompt="The old house", max_tokens=24, temperature=0, stop=stop)
    check("stop ends the text", cut.choices[0].text == greedy[:greedy.index(stop)], (greedy, stop, cut.choices[0].text))
    check("finish_reason stop", cut.choices[0].finish_reason == "stop")
    check("finish_reason length", first.choices[0].finish_reason in ("length", "stop"))
    echoed = client.completions.create(model=model, prompt="The old house", max_tokens=1, temperature=0, echo=True,
                                       logprobs=1).choices[0]
    scores = echoed.logprobs
    check("echo begins with the prompt", echoed.text.startswith("The old house"))
    check("echo scores every token but the first", scores.token_logprobs[0] is None and
          all(value <= 0 for value in scores.token_logprobs[1:]))
    check("the last token is the likeliest", scores.token_logprobs[-1] == max(scores.top_logprobs[-1].values()))


def check_chat(client, model):
    settings = dict(model=model, messages=[{"role": "user", "content": "Tell me a story."}], seed=3)
    try:
        whole = client.chat.completions.create(**settings, max_tokens=12, logprobs=True, top_logprobs=3)
    except openai.BadRequestError as error:
        if error.code == "no_chat_template":
            print("--   chat: the model has no chat template")
            return
        raise
    choice = whole.choices[0]
    check("chat answers as the assistant", choice.message.role == "assistant")
    entries = choice.logprobs.content
    check("chat scores every token", len(entries) == whole.usage.completion_tokens)
    check("three likeliest each", all(len(entry.top_logprobs) == 3 for entry in entries))
    check("probabilities are such", all(sum(math.exp(top.logprob) for top in entry.top_logprobs) <= 1 + 1e-9 for entry in entries))
    chunks = list(client.chat.completions.create(**settings, max_completion_tokens=12, stream=True,
                                                 stream_options={"include_usage": True}))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    check("a chat stream adds up", text == choice.message.content, text)
    check("the first chunk has the role", chunks[0].choices[0].delta.role == "assistant")
    check("usage ends the stream", chunks[-1].usage is not None and not chunks[-1].choices)
    parts = [{"role": "user", "content": [{"type": "text", "text": "Tell me a story."}]}]
    same = client.chat.completions.create(model=model, messages=parts, seed=3, max_tokens=12)
    check("text parts are text", same.choices[0].message.content == choice.message.content)
    refused("an image is refused", openai.BadRequestError, lambda: client.chat.completions.create(
        model=model, messages=[{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]))
    refused("tools are refused", openai.BadRequestError, lambda: client.chat.completions.create(
        **settings, tools=[{"type": "function", "function": {"name": "f"}}]))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url")
    parser.add_argument("--api-key", default="none")
    arguments = parser.parse_args()
    client = openai.OpenAI(base_url=arguments.url + "/v1", api_key=arguments.api_key, max_retries=0, timeout=120)
    models = client.models.list().data
    check("one model", len(models) == 1)
    model = models[0].id
    check_completions(client, model)
    check_chat(client, model)
    refused("another model is a 404", openai.NotFoundError,
            lambda: client.completions.create(model="gpt-4", prompt="a"))
    refused("embeddings are a 404", openai.NotFoundError,
            lambda: client.embeddings.create(model=model, input="a"))
    for field, value in (("suffix", "x"), ("best_of", 2), ("logprobs", 9), ("temperature", -1)):
        refused(f"{field}={value} is refused", openai.BadRequestError,
                lambda: client.completions.create(**{"model": model, "prompt": "a", field: value}))
    print(f"{failed} checks failed" if failed else "all checks passed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
