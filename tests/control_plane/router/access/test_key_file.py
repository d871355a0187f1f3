"""What a file of keys may say, and that no mistake in it shows a key."""

from pathlib import Path

import pytest

from control_plane.options import EdgeOptions, OptionError
from control_plane.router.access.key_file import read_keys
from control_plane.router.access.tenants import Tenant
from engine.base.errors import Unauthenticated


def write(folder: Path, text: str) -> EdgeOptions:
    file = folder / "keys"
    file.write_text(text)
    return EdgeOptions(api_key_file=file)


def test_a_file_and_flags_together(tmp_path: Path) -> None:
    file = write(tmp_path, "# ours\nacme sk-1\nacme  sk-2 # the new one\n\nops sk-3 admin\n").api_key_file
    keys = read_keys(EdgeOptions(api_keys=("sk-0",), api_key_file=file))
    of = {key: keys.tenant(f"Bearer sk-{key}") for key in range(4)}
    acme, ops = Tenant("acme"), Tenant("ops", admin=True)
    assert of == {0: Tenant("default", admin=True), 1: acme, 2: acme, 3: ops}


def test_a_key_may_hold_what_begins_a_comment_elsewhere(tmp_path: Path) -> None:
    keys = read_keys(write(tmp_path, "acme a#b # and a comment\n#acme c\n"))
    assert keys.tenant("Bearer a#b").name == "acme"
    for key in ("a", "c"):
        with pytest.raises(Unauthenticated):
            keys.tenant(f"Bearer {key}")


def test_no_keys_at_all_means_none_is_asked_for() -> None:
    assert read_keys(EdgeOptions()).tenant("").name == ""


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("sk-secret", "line 1: must be TENANT KEY"),
        ("a sk-secret root", "line 1: must be TENANT KEY"),
        ("a sk-1\nb/c sk-secret", "line 2: a tenant's name"),
        ("a sk-secret\nb sk-secret", "line 2: this key has been given before"),
        ("a sk-s\u00e9cret", "line 1: a key is made of printable ASCII"),
        ("# nothing\n", "holds no key"),
    ],
)
def test_mistakes_name_the_line_and_show_no_key(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(OptionError) as caught:
        read_keys(write(tmp_path, text))
    assert message in str(caught.value) and "secret" not in str(caught.value)
