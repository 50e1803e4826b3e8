"""What the tests of the server ask, and how they read streams."""

import json

QUESTION = "A box has 3 apples. 4 more are put in. How many apples are in the box?"
CHAT = {"messages": [{"role": "user", "content": QUESTION}]}


def events(text):
    """The chunks of a stream, which must end as it should."""
    lines = [line for line in text.split("\n\n") if line and not line.startswith(":")]
    assert all(line.startswith("data: ") for line in lines), text
    assert lines[-1] == "data: [DONE]", text
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


def stream(client, path, body, **options):
    """The chunks of a request, streamed."""
    response = client.post(path, json={**body, "stream": True}, **options)
    assert response.status_code == 200, response.text
    assert response.headers["content-type"].startswith("text/event-stream")
    return events(response.text)


def answer(client, path, body, **options):
    response = client.post(path, json=body, **options)
    assert response.status_code == 200, response.text
    return response.json()


def error(response, status):
    """The error of a response, in OpenAI's form."""
    assert response.status_code == status, response.text
    (found,) = response.json().values()
    assert set(found) == {"message", "type", "param", "code"}
    assert found["code"] == status
    return found


def joined(chunks):
    """Of each choice of a stream what a whole answer has: text, token_ids, logprobs, and how it ended."""
    found = {}
    for chunk in chunks:
        for choice in chunk["choices"]:
            mine = found.setdefault(
                choice["index"], {"text": "", "token_ids": [], "logprobs": [], "finish_reason": None}
            )
            assert mine["finish_reason"] is None, "a choice goes on after its end"
            mine["text"] += choice["text"] if "text" in choice else choice["delta"].get("content") or ""
            mine["token_ids"] += choice.get("token_ids", [])
            mine["finish_reason"], mine["stop_reason"] = choice["finish_reason"], choice.get("stop_reason")
            if choice["logprobs"]:
                mine["logprobs"].append(choice["logprobs"])
    return [found[index] for index in sorted(found)]


def merged(tables):
    """The logprobs of several chunks as one."""
    found = {}
    for table in tables:
        for name, values in table.items():
            found[name] = found.get(name, []) + values if values is not None else None
    return found
