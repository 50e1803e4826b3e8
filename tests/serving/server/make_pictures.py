"""Takes the pictures of the page that README.md and docs/server.md show, of a server with the embedded model.

python -m tests.serving.server.make_pictures
"""

import asyncio
import json
import pathlib
import threading
import time

import httpx

from gdnjax import AsyncLLM
from gdnjax.assets import model_directory
from gdnjax.serving.server.app import make_app
from gdnjax.serving.server.settings import ServerConfig
from tests.serving.server.browsing import browsing
from tests.serving.server.sockets import serving

DOCS = pathlib.Path(__file__).parents[3] / "docs"
SIZE = (1180, 800)
QUESTIONS = (
    "A box has 3 apples. 4 more are put in. How many apples are in the box?",
    "Lily has 25 maps. Tom has 40 more than Lily. How many maps do they have together?",
)
SECONDS = 90
NUM_CLIENTS = 6
OPTIONS = {
    "max_num_seqs": 4,
    "max_model_len": 512,
    "num_speculative_tokens": 2,
    # Room that is left, to be seen.
    "num_kv_blocks": 3072,
    "num_checkpoint_slots": 60,
    # One size of each step.
    "max_num_batched_tokens": 128,
    "prefill_buckets": (128,),
    "decode_buckets": (4,),
    "use_tqdm": False,
}


async def work(url: str, ended: threading.Event) -> None:
    """Clients that ask on and off, as clients do, so that there is something to see."""
    lines = (model_directory("tiny") / "problems.jsonl").read_text().splitlines()
    problems = [json.loads(line)["question"] for line in lines]

    async def client(number: int) -> None:
        async with httpx.AsyncClient(base_url=url, timeout=600) as session:
            for turn in range(10**6):
                if ended.is_set():
                    return
                # Two of them at all times, the others every other while.
                if number > 1 and (turn // 8) % 2:
                    await asyncio.sleep(1.5)
                problem = problems[(number * 31 + turn) % len(problems)]
                messages = [{"role": "system", "content": "Solve the problem step by step."}]
                messages += [{"role": "user", "content": problem}]
                await session.post("/v1/chat/completions", json={"messages": messages, "seed": turn})

    await asyncio.gather(*(client(number) for number in range(NUM_CLIENTS)))


def main() -> None:
    llm = AsyncLLM("tiny", **OPTIONS)
    with serving(make_app(llm, ServerConfig(served_model_names=("tiny",)))) as url, browsing() as page:
        page.resize(SIZE)
        page.colours("light")
        page.open(url)
        page.until(lambda: page.text("#model-name") == "tiny", "the model's name")
        page.one("#settings-toggle").click()
        page.one("#temperature").send_keys("0")
        page.run("document.querySelector('#message').focus()")
        for question in QUESTIONS:
            page.say(question)
            page.answer(QUESTIONS.index(question) + 1)
        page.driver.save_screenshot(str(DOCS / "server-chat.png"))
        ended = threading.Event()
        clients = threading.Thread(target=lambda: asyncio.run(work(url, ended)))
        clients.start()
        page.one("#to-engine").click()
        time.sleep(SECONDS)
        page.driver.save_screenshot(str(DOCS / "server-engine.png"))
        ended.set()
        clients.join()
    llm.close()


if __name__ == "__main__":
    main()
