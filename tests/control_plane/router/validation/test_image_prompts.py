"""A conversation with images: parts in order, placeholders where the template has them, refusals by place."""

import asyncio
import json
from typing import Any

import pytest

from control_plane.router.media.fetch import Fetcher
from control_plane.router.media.reader import ImageMemory
from control_plane.router.validation.image_prompt import runs
from engine.base import limits
from engine.base.errors import DeadlineExceeded, ResourceExhausted
from engine.images import Run
from tests.control_plane.router.edge_fakes import Router, turns
from tests.control_plane.router.seeing import (
    CARD,
    IMAGE,
    VISION,
    WITHOUT_LAYOUT,
    asking,
    data_url,
    image_part,
    picture,
    saved,
    seeing,
    vocabulary,
)

pytestmark = pytest.mark.procs  # pictures are decoded by the real thing
WIDE = data_url(saved(picture(40, 20)))  # 2 rows of 3
BARE = "{% for message in messages %}{{ message.content if message.content is string else 'x' }}{% endfor %}"
TWICE = "{% for m in messages %}{% for p in m.content %}{{ p.text or '<image><image>' }}{% endfor %}{% endfor %}"


async def told(router: Router, messages: Any, **fields: Any) -> tuple[int, str]:
    answer = await router.converse(messages=messages, **fields)
    return answer.status_code, answer.json().get("error", {}).get("message", "")


def text_of(token_ids: Any) -> str:
    detokenizer = vocabulary().detokenizer(frozenset(), skip_special_tokens=False)
    return detokenizer.push(list(token_ids)) + detokenizer.finish()


# -- what is served ----------------------------------------------------------------------------------------------------
async def test_images_stand_where_they_were_sent() -> None:
    with seeing() as router:
        reply = await router.converse(messages=asking("a", image_part(), "b", image_part(WIDE)))
        (submit,) = router.core.submits
        expected = f"<user>a[{IMAGE * 2}|]b[{IMAGE * 3}|{IMAGE * 3}|]<end><assistant>"
        assert text_of(submit.token_ids) == expected
        small, wide = submit.images
        assert small.image.runs == (Run(3, 2),) and wide.image.runs == (Run(9, 3), Run(13, 3))
        assert (small.image.grid, wide.image.grid) == ((1, 2), (2, 3))
        assert all(
            submit.token_ids[at] == VISION.image_token_id for run in wide.image.runs for at in range(*run[:1], sum(run))
        )
        assert (small.picture.pixels, wide.picture.width) == (picture().tobytes(), 40)
        usage = reply.json()["usage"]
        assert usage["prompt_tokens"] == len(submit.token_ids)
        details = usage["prompt_tokens_details"]
        assert details["multimodal_tokens"] == {"image": 8} and details["cached_multimodal_tokens"] == {"image": 0}


async def test_conversations_of_text_are_what_they_were() -> None:
    with seeing() as router:
        reply = await router.converse(messages=asking("a", "b"))
        (submit,) = router.core.submits
        assert text_of(submit.token_ids) == "<user>a\nb<end><assistant>" and submit.images == ()
        assert "multimodal_tokens" not in reply.json()["usage"]["prompt_tokens_details"]


async def test_several_messages_and_every_way_to_write_a_part() -> None:
    url = data_url(saved(picture()))
    with seeing() as router:
        messages = [
            {"role": "system", "content": "s"},
            {"role": "user", "content": [{"type": "image_url", "image_url": url}, "q"]},
            {"role": "assistant", "content": "r"},
            {"role": "user", "content": [{"type": "input_image", "image_url": url, "uuid": "mine"}]},
            {
                "role": "user",
                "content": [{"type": "image_url", "image_url": {"url": url, "detail": "low"}, "uuid": None}],
            },
        ]
        assert await told(router, messages) == (200, "")
        (submit,) = router.core.submits
        seen = f"[{IMAGE * 2}|]"
        assert text_of(submit.token_ids) == (
            f"<system>s<end><user>{seen}q<end><assistant>r<end><user>{seen}<end><user>{seen}<end><assistant>"
        )
        assert len({one.image.key for one in submit.images}) == 1


async def test_users_cannot_write_an_image() -> None:
    with seeing() as router:
        assert (await told(router, asking(f"a{IMAGE}", image_part(), "<ima", "ge>")))[0] == 200
        (submit,) = router.core.submits
        assert text_of(submit.token_ids) == f"<user>a{IMAGE}[{IMAGE * 2}|]<image><end><assistant>"
        assert [at for at, token in enumerate(submit.token_ids) if token == VISION.image_token_id] == [10, 11]


async def test_a_key_is_of_pixels_tenant_and_salt_and_not_of_a_label() -> None:
    with seeing() as router:
        part, other = image_part(), image_part(WIDE)
        for changed in (
            {},
            {"messages": asking({**part, "uuid": "x"})},
            {"cache_salt": "s"},
            {"messages": asking(other)},
        ):
            assert (await told(router, **{"messages": asking(part), **changed}))[0] == 200
        same, labelled, salted, others = (submit.images[0].image.key for submit in router.core.submits)
        assert same == labelled and len({same, salted, others}) == 3


async def test_an_answer_may_go_on_with_a_message_behind_an_image() -> None:
    with seeing() as router:
        messages = [*asking(image_part(), "who?"), {"role": "assistant", "content": "It is"}]
        fields = {"add_generation_prompt": False, "continue_final_message": True}
        assert await told(router, messages, **fields) == (200, "")
        assert text_of(router.core.submits[0].token_ids).endswith("<assistant>It is")
        assert await told(router, asking("a", image_part()), **fields) == (
            400,
            "continue_final_message: the final message must end with text",
        )


async def test_tokenize_counts_images() -> None:
    with seeing() as router:
        reply = await router.request("POST", "/tokenize", json={"messages": asking("a", image_part(WIDE))})
        assert text_of(reply.json()["tokens"]) == f"<user>a[{IMAGE * 3}|{IMAGE * 3}|]<end><assistant>"


async def test_a_body_with_images_may_be_larger_than_one_of_text() -> None:
    large = saved(picture()) + bytes(limits.BODY_BYTES_MAX)  # rubbish behind the end of a PNG is no damage
    with seeing() as router:
        messages = asking(image_part(data_url(large)))
        assert await told(router, messages) == (200, "")
        reply = await router.complete(prompt="a", user=data_url(large))
        assert reply.status_code == 413
    blind = Router(chat=None)
    assert (await blind.converse(messages=messages)).status_code == 413


# -- what is refused ---------------------------------------------------------------------------------------------------
def bad_part(part: Any) -> list[dict[str, Any]]:
    return asking("a", part)


PLACE = "messages[0].content[1]"
SHAPE = f"{PLACE}.image_url: must be a URL, or an object that has one"
DETAIL = f"{PLACE}.image_url.detail: must be one of: auto, low, high"
LAYOUT = f"{PLACE}: the served model does not take images of this shape"
ACCEPTED = "text, input_text, output_text, image_url, input_image"
EMBEDS = f"{PLACE}: image_embeds parts are not served; accepted types: {ACCEPTED}"
REFUSED: list[tuple[Any, str]] = [
    ({"type": "image_url"}, SHAPE),
    ({"type": "image_url", "image_url": 7}, SHAPE),
    ({"type": "image_url", "image_url": {}}, SHAPE),
    ({"type": "image_url", "image_url": {"url": None}}, SHAPE),
    ({"type": "image_url", "image_url": [SHAPE]}, SHAPE),
    ({"type": "image_url", "image_url": {"url": WIDE, "detail": "huge"}}, DETAIL),
    ({**image_part(), "uuid": "x" * 129}, f"{PLACE}.uuid: must be a string of at most 128 characters"),
    ({**image_part(), "uuid": 7}, f"{PLACE}.uuid: must be a string of at most 128 characters"),
    (image_part("data:image/png;base64,AAA"), f"{PLACE}: its base64 text is damaged, or not whole"),
    (image_part("data:image/png,AAAA"), f"{PLACE}: must be a data URL of base64 text, as in data:image/png;base64,..."),
    (image_part("data:image/png;base64,"), f"{PLACE}: must hold at least 1 byte"),
    (image_part("data:image/png;base64,AAAA"), f"{PLACE}: must be a PNG, JPEG, WebP or GIF file"),
    (image_part(data_url(saved(picture(WITHOUT_LAYOUT, 9)))), LAYOUT),
    ({"type": "image_embeds", "image_embeds": "x"}, EMBEDS),
]


async def test_a_bad_part_is_refused_by_its_place() -> None:
    with seeing() as router:
        for part, message in REFUSED:
            assert await told(router, bad_part(part)) == (400, message)
        assert router.core.delivered == []


async def test_images_have_their_roles_and_their_number() -> None:
    with seeing() as router:
        for role in ("system", "assistant", "tool", "developer"):
            messages = [{"role": role, "content": [image_part()]}]
            told_of = "messages[0].content[0]: images are served in users' messages only"
            assert await told(router, messages) == (400, told_of)
        many = [*asking(*[image_part()] * 3), *asking("x", *[image_part()] * 2)]
        told_of = f"messages[1].content[2]: at most {CARD.images_max} images in one conversation"
        assert await told(router, many) == (400, told_of)


async def test_a_prompt_is_as_long_as_its_images_make_it() -> None:
    with seeing() as router:
        large = image_part(data_url(saved(picture(1_600, 900))))  # 5,700 placeholders
        status, message = await told(router, asking(large))
        assert status == 400 and message.startswith("messages: at most 4095 tokens, got 5700 for images")
        status, message = await told(router, asking(image_part()), max_tokens=4_095)
        assert status == 400 and message.startswith("max_tokens: prompt and max_tokens together at most 4096 tokens")
        assert await told(router, asking(image_part()), truncate_prompt_tokens=5) == (
            400,
            "truncate_prompt_tokens: not with images: a part of one is none",
        )


@pytest.mark.parametrize("source", [BARE, TWICE])
async def test_a_template_that_loses_or_repeats_images_serves_none(source: str) -> None:
    with seeing(source) as router:
        told_of = "messages: the model's chat template does not have each image once"
        assert await told(router, asking("a", image_part())) == (400, told_of)


async def test_a_prompt_of_completions_is_text() -> None:
    with seeing() as router:
        assert (await router.complete(prompt=asking(image_part()))).status_code == 400


async def test_a_prompt_of_ids_has_no_placeholders() -> None:
    with seeing() as router:
        refused = await router.complete(prompt=[7, VISION.image_token_id, 8])
        assert refused.status_code == 400
        assert "the token that stands for images" in refused.json()["error"]["message"]
        assert (await router.complete(prompt=[7, VISION.image_token_id + 1, 8])).status_code == 200


# -- memory ------------------------------------------------------------------------------------------------------------
PIXELS = 20 * 10 * 3


async def test_pixels_are_counted_until_the_request_ends() -> None:
    memory = ImageMemory()
    with seeing(memory=memory) as router:
        router.core.script = None
        asked = asyncio.create_task(router.converse(messages=asking(image_part(), image_part())))
        await router.core.until(lambda: router.core.submits)
        assert memory.held_bytes == 2 * PIXELS
        router.core.tokens(1, 5)
        await turns()
        assert memory.held_bytes == 2 * PIXELS
        router.core.end(1)
        assert memory.held_bytes == 0  # also while the client is still reading
        assert (await asked).status_code == 200


async def test_a_request_that_never_starts_holds_nothing() -> None:
    memory = ImageMemory()
    with seeing(memory=memory) as router:
        for fields in ({"max_tokens": 4_095}, {"min_tokens": 9, "max_tokens": 5}, {"truncate_prompt_tokens": 5}):
            assert (await told(router, asking(image_part()), **fields))[0] == 400
        assert (await told(router, asking(image_part(), image_part("data:x"))))[0] == 400
        assert memory.held_bytes == 0
        request = await router.validator.chat(json.dumps({"messages": asking(image_part())}).encode())
        assert memory.held_bytes == PIXELS
        router.edge.end_all(ResourceExhausted("over"))
        with pytest.raises(ResourceExhausted):
            router.edge.open(request)
        assert memory.held_bytes == 0


async def test_more_pixels_than_there_is_room_for_are_refused_for_now() -> None:
    memory = ImageMemory(bytes_max=PIXELS)
    with seeing(memory=memory) as router:
        status, message = await told(router, asking(image_part(), image_part()))
        assert (status, message) == (429, "too many images at once")
        assert memory.held_bytes == 0
        assert (await told(router, asking(image_part())))[0] == 200


async def test_a_client_that_leaves_while_its_images_are_decoded_holds_nothing() -> None:
    memory = ImageMemory()
    with seeing(memory=memory) as router:
        body = json.dumps({"messages": asking(image_part(), image_part())}).encode()
        reading = asyncio.create_task(router.validator.chat(body))
        await turns()
        reading.cancel()
        await asyncio.gather(reading, return_exceptions=True)
        assert memory.held_bytes == 0
        assert (await told(router, asking(image_part())))[0] == 200


class NeverThere(Fetcher):
    def __init__(self, hung_up: asyncio.Event) -> None:
        super().__init__()
        self._hung_up = hung_up

    async def fetch(self, url: str, *, tenant: str = "") -> list[bytes]:
        try:
            await asyncio.Event().wait()
        finally:
            await self._hung_up.wait()
        return []


async def test_a_request_s_time_is_that_of_all_its_images_together() -> None:
    memory, hung_up = ImageMemory(), asyncio.Event()
    hung_up.set()
    with seeing(memory=memory, fetcher=NeverThere(hung_up)) as router:
        content = asking(*[image_part("https://images.example/a.png")] * 3)
        body = json.dumps({"messages": content, "triptych": {"deadline_ms": 1}}).encode()
        async with asyncio.timeout(20):
            with pytest.raises(DeadlineExceeded, match="while its images were read"):
                await router.validator.chat(body)
        assert memory.held_bytes == 0


async def test_who_is_cancelled_again_and_again_holds_nothing() -> None:
    memory, hung_up = ImageMemory(), asyncio.Event()
    with seeing(memory=memory, fetcher=NeverThere(hung_up)) as router:
        body = json.dumps({"messages": asking(*[image_part("https://images.example/a.png")] * 2)}).encode()
        reading = asyncio.create_task(router.validator.chat(body))
        await turns()
        assert memory.held_bytes > 0
        for _ in range(3):
            reading.cancel()
            await turns()
        hung_up.set()
        await asyncio.gather(reading, return_exceptions=True)
        assert memory.held_bytes == 0


# -- runs --------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("places", "found"),
    [
        ([], []),
        ([3], [Run(3, 1)]),
        ([3, 4, 5], [Run(3, 3)]),
        ([1, 2, 4, 7, 8], [Run(1, 2), Run(4, 1), Run(7, 2)]),
    ],
)
def test_neighbours_are_one_run(places: list[int], found: list[Run]) -> None:
    assert list(runs(places)) == found
