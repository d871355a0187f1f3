"""triptych.settings and triptych.sources: one name everywhere, the stronger source wins, a mistake names its place."""

import dataclasses
import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from control_plane.options import (
    ControllerOptions,
    Dtype,
    EdgeOptions,
    EngineOptions,
    LogFormat,
    RouterOptions,
    WorkerOptions,
)
from deploy.children import OWN_VARIABLES, PREFIX
from deploy.options import ServeOptions
from engine.types import Role
from triptych.mistakes import ConfigError
from triptych.settings import COMMANDS, SAID, settings_of
from triptych.sources import CONFIG_VARIABLE, Source, plain, read, schema, unknown_variables

NEEDED: Mapping[type, dict[str, Any]] = {
    ServeOptions: {},
    RouterOptions: {"controller": "h:1"},
    ControllerOptions: {"listen": "h:1"},
    WorkerOptions: {"controller": "h:1", "name": "w", "role": [Role.PREFILL]},
}
EVERY = [(kind, setting) for kind in COMMANDS.values() for setting in settings_of(kind)]
FLAG, ENVIRONMENT, FILE, DEFAULT = Source.FLAG, Source.ENVIRONMENT, Source.FILE, Source.DEFAULT


@pytest.fixture(autouse=True)
def no_settings_around(monkeypatch: pytest.MonkeyPatch) -> None:
    for _, setting in EVERY:
        monkeypatch.delenv(setting.variable, raising=False)
    monkeypatch.delenv(CONFIG_VARIABLE, raising=False)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "triptych.yaml"


def mistakes(kind: type, path: Path | None = None, **flags: Any) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        _ = read(kind, NEEDED[kind] | flags, path).options
    return list(caught.value.lines)


# -- what there is -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", SAID)
def test_every_field_of_the_options_is_a_setting(kind: type) -> None:
    fields = {field.name for field in dataclasses.fields(kind)} - {"engine", "edge"}
    assert set(SAID[kind]) == fields


@pytest.mark.parametrize("kind", COMMANDS.values())
def test_what_nobody_set_is_as_the_options_have_it(kind: type) -> None:
    configured = read(kind, NEEDED[kind])
    assert configured.options == kind(**_fields(kind, NEEDED[kind]))
    assert {str(found.origin) for found in configured.found.values()} <= {"flag", "default"}


@pytest.mark.parametrize("kind", COMMANDS.values())
def test_every_default_is_the_one_of_the_options(kind: type) -> None:
    options = kind(**_fields(kind, NEEDED[kind]))
    owners = [options, *(getattr(options, part) for part in ("engine", "edge") if hasattr(options, part))]
    found = read(kind, NEEDED[kind]).found
    for setting in settings_of(kind):
        (actual,) = [getattr(owner, setting.field) for owner in owners if setting.field in _names(owner)]
        if not setting.required:
            assert (setting.default, found[setting.name].value) == (actual, actual), setting.name


def _fields(kind: type, flags: Mapping[str, Any]) -> dict[str, Any]:
    values = {setting.field: flags[setting.name] for setting in settings_of(kind) if setting.name in flags}
    return values | ({"roles": frozenset(values["roles"])} if "roles" in values else {})


def _names(options: Any) -> set[str]:
    return {field.name for field in dataclasses.fields(options)}


@pytest.mark.parametrize("kind", COMMANDS.values())
def test_no_two_settings_share_a_name(kind: type) -> None:
    names = [name for s in settings_of(kind) for name in (s.name, *s.said.aliases)]
    assert len(names) == len(set(names))


def test_names_are_the_ones_that_vllm_uses() -> None:
    vllm = {
        *("model", "served-model-name", "max-model-len", "block-size", "dtype", "device", "max-num-batched-tokens"),
        *("enable-prefix-caching", "host", "port", "api-key", "ssl-keyfile", "ssl-certfile", "ssl-ca-certs"),
        *("chat-template", "limit-mm-per-prompt", "allowed-media-domains"),
    }
    assert vllm <= {setting.name for setting in settings_of(ServeOptions)}


def test_a_variable_is_never_one_of_our_own() -> None:
    assert not {setting.variable for _, setting in EVERY} & {CONFIG_VARIABLE, *OWN_VARIABLES}


# -- which source wins -------------------------------------------------------------------------------------------------
# For each setting, what a flag, a variable and a line of the file say, and what comes of each.
SAYINGS: Mapping[str, Mapping[Source, tuple[Any, Any]]] = {
    "port": {FLAG: (1, 1), ENVIRONMENT: ("2", 2), FILE: ("3", 3), DEFAULT: (None, 8000)},
    "model": {FLAG: ("a", "a"), ENVIRONMENT: ("b", "b"), FILE: ("c", "c"), DEFAULT: (None, "smollm2")},
    "dtype": {
        FLAG: (Dtype.FLOAT32, Dtype.FLOAT32),
        ENVIRONMENT: ("bfloat16", Dtype.BFLOAT16),
        FILE: ("float32", Dtype.FLOAT32),
        DEFAULT: (None, Dtype.AUTO),
    },
    "enable-prefix-caching": {
        FLAG: (False, False),
        ENVIRONMENT: ("true", True),
        FILE: ("off", False),
        DEFAULT: (None, True),
    },
    "kl-budget": {FLAG: (0.5, 0.5), ENVIRONMENT: ("0.25", 0.25), FILE: ("1", 1.0), DEFAULT: (None, None)},
    "profile": {
        FLAG: (Path("a"), Path("a")),
        ENVIRONMENT: ("b", Path("b")),
        FILE: ("c", Path("c")),
        DEFAULT: (None, None),
    },
    "api-key": {
        FLAG: (["a,b"], ("a,b",)),
        ENVIRONMENT: ("c, d", ("c", "d")),
        FILE: ("[e, f]", ("e", "f")),
        DEFAULT: (None, ()),
    },
    "limit-mm-per-prompt": {
        FLAG: ('{"image": 4}', 4),
        ENVIRONMENT: ("image=5", 5),
        FILE: ("{image: 6, video: 0}", 6),
        DEFAULT: (None, 16),
    },
    "allowed-media-domains": {
        FLAG: (["a.b", "c"], ("a.b", "c")),
        ENVIRONMENT: ("d, e", ("d", "e")),
        FILE: ("[f, g]", ("f", "g")),
        DEFAULT: (None, ()),
    },
    "drain-timeout": {FLAG: (1.5, 1.5), ENVIRONMENT: ("2", 2.0), FILE: ("3", 3.0), DEFAULT: (None, 30.0)},
}
PAIRS = [(name, *pair) for name in SAYINGS for pair in itertools.combinations((FLAG, ENVIRONMENT, FILE, DEFAULT), 2)]


@pytest.mark.parametrize(("name", "stronger", "weaker"), PAIRS)
def test_the_stronger_source_wins(
    name: str, stronger: Source, weaker: Source, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sayings = SAYINGS[name]
    flags = {}
    for source in (stronger, weaker):
        if source is FLAG:
            flags[name] = sayings[FLAG][0]
        if source is ENVIRONMENT:
            monkeypatch.setenv(PREFIX + name.upper().replace("-", "_"), sayings[ENVIRONMENT][0])
        if source is FILE:
            file.write_text(f"# a comment\n{name}: {sayings[FILE][0]}\n")
    found = read(ServeOptions, flags, file if file.exists() else None).found[name]
    assert (found.value, found.origin.source) == (sayings[stronger][1], stronger)
    assert type(found.value) is type(sayings[stronger][1])


def test_an_origin_says_where(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file.write_text("\nhost: h\nadmin_port: 7\n")
    monkeypatch.setenv("TRIPTYCH_PORT", "9")
    found = read(ServeOptions, {"decode": 2}, file).found
    origins = {name: str(found[name].origin) for name in ("host", "admin-port", "port", "decode", "mixed")}
    assert origins == {
        "host": f"file {file}:2",
        "admin-port": f"file {file}:3",
        "port": "environment TRIPTYCH_PORT",
        "decode": "flag",
        "mixed": "default",
    }


def test_a_variable_names_the_file_and_a_flag_names_another(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file.write_text("port: 1")
    monkeypatch.setenv(CONFIG_VARIABLE, str(file))
    assert read(ServeOptions, {}).options.port == 1
    (tmp_path / "other.yaml").write_text("port: 2")
    assert read(ServeOptions, {}, tmp_path / "other.yaml").options.port == 2


def test_an_empty_variable_says_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRIPTYCH_PORT", "")
    assert read(ServeOptions, {}).options.port == 8000


def test_a_worker_can_be_described_by_variables_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"NAME": "w", "CONTROLLER": "h:1", "ROLE": "prefill,decode", "CORES": "2,3"}.items():
        monkeypatch.setenv(PREFIX + name, value)
    expected = WorkerOptions(name="w", controller="h:1", roles=frozenset({Role.PREFILL, Role.DECODE}), cores=(2, 3))
    assert read(WorkerOptions, {}).options == expected


def test_a_list_in_a_variable_may_be_json(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a launcher gives its router: a key may hold a comma."""
    monkeypatch.setenv("TRIPTYCH_API_KEY", '["a,b", "[c"]')
    assert read(ServeOptions, {}).options.edge.api_keys == ("a,b", "[c")


def test_a_file_may_be_empty(file: Path) -> None:
    file.write_text("# nothing yet\n")
    assert read(ServeOptions, {}, file).options == ServeOptions()


def test_a_file_reaches_every_part_of_the_options(file: Path) -> None:
    file.write_text("block-size: 8\nqueue_timeout: 2\nlog-format: json\nmax-model-len: null\nprefill: 3")
    assert read(ServeOptions, {}, file).options == ServeOptions(
        engine=EngineOptions(block_size=8),
        edge=EdgeOptions(queue_timeout_s=2.0),
        log_format=LogFormat.JSON,
        prefill=3,
    )


@pytest.mark.parametrize(
    ("written", "images"),
    [(7, 7), ("7", 7), (" 7 ", 7), ("image=7", 7), ("video=0, image=7", 7), ("audio=1", 16), ("{}", 16)],
)
def test_images_may_be_limited_as_in_other_servers(written: Any, images: int) -> None:
    assert read(ServeOptions, {"limit-mm-per-prompt": written}).options.edge.limit_mm_per_prompt == images


# -- mistakes ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("prot: 1", "FILE:1: unknown setting 'prot'; did you mean port?"),
        ("port: 1\nzzzz: 1", "FILE:2: unknown setting 'zzzz'"),
        ("step-tokens: 1", "FILE:1: unknown setting 'step-tokens'; it is called max-num-batched-tokens now"),
        ("threads: 1", "FILE:1: 'threads' is a setting of triptych worker, not of triptych serve"),
        ("port: 1\nport: 2", "FILE:2: 'port' has been set before, at FILE:1"),
        ("admin-port: 1\nadmin_port: 2", "FILE:2: 'admin-port' has been set before, at FILE:1"),
        ("1: 2", "FILE:1: a setting's name is text, such as 'port'"),
        ("- port", "FILE:1: must be lines of 'name: value'"),
        ("port", "FILE:1: must be lines of 'name: value'"),
        ("host: [", "FILE:1: is not YAML: expected the node content, but found '<stream end>'"),
        ("a: b: c", "FILE:1: is not YAML: mapping values are not allowed here"),
        ("\tport: 1", "FILE:1: is not YAML: found character '\\t' that cannot start any token"),
        ("port: !!python/name:os.system", "FILE:1: is not YAML: could not determine a constructor for the tag"),
        ("port: \x07", "FILE: is not YAML that can be read"),
        ("port: 2024-99-99", "FILE: is not YAML that can be read"),
        ("port: " + "[" * 10_000, "FILE: is not YAML that can be read"),
        ("port: http", "FILE:1: port: must be a whole number, not text ('http')"),
        ("port: 1.5", "FILE:1: port: must be a whole number, not a number (1.5)"),
        ("port: yes", "FILE:1: port: must be a whole number, not true or false (true)"),
        ("port:", "FILE:1: port: must be a whole number, not nothing"),
        ("port: [1]", "FILE:1: port: must be a whole number, not a list"),
        ("kl-budget: {a: 1}", "FILE:1: kl-budget: must be a number, not a mapping"),
        ("kl-budget: on", "FILE:1: kl-budget: must be a number, not true or false (true)"),
        ("model: 7", "FILE:1: model: must be text, not a number (7)"),
        ("profile: 2024-01-01", "FILE:1: profile: must be a path, not a date"),
        ("enable-prefix-caching: maybe", "FILE:1: enable-prefix-caching: must be true or false, not text ('maybe')"),
        ("dtype: float8", "FILE:1: dtype: must be one of auto, float32, bfloat16, not text ('float8')"),
        (f"dtype: {'x' * 99}", f"FILE:1: dtype: must be one of auto, float32, bfloat16, not text ('{'x' * 60}...')"),
        ("api-key: [1, 2]", "FILE:1: api-key: must be text, or a list of texts, not a number"),
        ("api-key: {secret: 1}", "FILE:1: api-key: must be text, or a list of texts, not a mapping"),
        ("api-key: '[secret'", "FILE:1: api-key: must be text, or a list of texts, not text"),
        ("api-key: ''", "FILE:1: api-key: holds no key; leave it out for a server without keys"),
        ("api-key: []", "FILE:1: api-key: holds no key; leave it out for a server without keys"),
        *(
            (
                f"limit-mm-per-prompt: {wrong}",
                'FILE:1: limit-mm-per-prompt: must be a whole number, image=N or {"image": N}',
            )
            for wrong in (
                *(
                    "many",
                    "image",
                    "image=",
                    "image=x",
                    "sound=1",
                    "on",
                    "1.5",
                    "[1]",
                    "''",
                    "'{'",
                    "'{\"image\": true}'",
                ),
                *("{image: 1.5}", "{images: 1}", "{image: {count: 1}}", "'" + '{"image":' * 10_000 + "'"),
            )
        ),
        ("limit-mm-per-prompt: 257", "FILE:1: limit-mm-per-prompt: must allow from 0 to 256 images, not 257"),
        ("allowed-media-domains: https://a", "FILE:1: allowed-media-domains: must be a host's name"),
        ("host: h\nport: 70000", "FILE:2: port: must be a port from 0 to 65535, not 70000"),
        ("drain-timeout: -1", "FILE:1: drain-timeout: must be a number of seconds, 0 or more, not -1.0"),
        ("max-num-batched-tokens: 0", "FILE:1: max-num-batched-tokens: must be at least 1, not 0"),
        ("chat-template: /no/such", "FILE:1: chat-template: there is no file '/no/such'"),
    ],
)
def test_a_mistake_in_a_file_is_told_with_its_line(text: str, told: str, file: Path) -> None:
    file.write_text(text)
    (line,) = mistakes(ServeOptions, file)
    assert line.replace(str(file), "FILE").startswith(told)


def test_all_mistakes_are_told_at_once(file: Path) -> None:
    file.write_text("port: a\nadmin-port: b\nhost: 1")
    assert len(mistakes(ServeOptions, file)) == 3


@pytest.mark.parametrize("content", [b"\xff\xfe\x00", b"#" * (1 << 20) + b"#"])
def test_a_file_is_text_and_not_endless(content: bytes, file: Path) -> None:
    file.write_bytes(content)
    (line,) = mistakes(ServeOptions, file)
    assert line.startswith(f"{file}: ")


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    assert mistakes(ServeOptions, tmp_path / "none") == [
        f"{tmp_path / 'none'}: cannot be read: No such file or directory"
    ]
    assert mistakes(ServeOptions, tmp_path) == [f"{tmp_path}: cannot be read: Is a directory"]


@pytest.mark.parametrize(
    ("name", "value", "told"),
    [
        ("PORT", "http", "TRIPTYCH_PORT: must be a whole number, not text ('http')"),
        ("LOG_LEVEL", "loud", "TRIPTYCH_LOG_LEVEL: must be one of debug, info, warning, error, not text ('loud')"),
        ("ENABLE_PREFIX_CACHING", "2", "TRIPTYCH_ENABLE_PREFIX_CACHING: must be true or false, not text ('2')"),
        ("API_KEY", "[secret", "TRIPTYCH_API_KEY: must be text, or a list of texts, not text"),
        *(
            ("API_KEY", empty, "TRIPTYCH_API_KEY: holds no key; leave it out for a server without keys")
            for empty in ("", " ", ",", "[]")
        ),
        ("PREFILL", "-1", "TRIPTYCH_PREFILL: must be at least 0, not -1"),
    ],
)
def test_a_mistake_in_a_variable_names_it(name: str, value: str, told: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(PREFIX + name, value)
    assert mistakes(ServeOptions) == [told]


def test_a_key_from_elsewhere_makes_up_for_an_empty_variable(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRIPTYCH_API_KEY", "")
    file.write_text("api-key: k")
    assert read(ServeOptions, {}, file).options.edge.api_keys == ("k",)
    assert read(ServeOptions, {"api-key": ["f"]}).options.edge.api_keys == ("f",)
    assert read(ControllerOptions, {"listen": "h:1"}).options.listen == "h:1"


def test_a_mistake_in_a_flag_names_it() -> None:
    assert mistakes(ServeOptions, **{"block-size": 0}) == ["--block-size: must be at least 1, not 0"]
    assert mistakes(WorkerOptions, cores="0,x") == ["--cores: must be whole numbers, not text ('x')"]


def test_what_is_needed_is_asked_for_by_all_its_names() -> None:
    with pytest.raises(ConfigError) as caught:
        read(RouterOptions, {})
    assert str(caught.value) == "--controller: is needed; or set TRIPTYCH_CONTROLLER, or 'controller' in a file"


def test_a_misspelt_variable_is_noticed() -> None:
    known = {"PATH", "TRIPTYCH_PORT", "TRIPTYCH_THREADS", "TRIPTYCH_CONFIG", *OWN_VARIABLES}
    assert list(unknown_variables(known)) == []
    assert list(unknown_variables(known | {"TRIPTYCH_PROT", "TRIPTYCH_XYZZY"})) == [
        "TRIPTYCH_PROT is not a setting; did you mean TRIPTYCH_PORT?",
        "TRIPTYCH_XYZZY is not a setting",
    ]


# -- the schema --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", COMMANDS.values())
def test_the_schema_has_every_setting_and_accepts_every_default(kind: type) -> None:
    written = schema(kind)
    jsonschema.Draft202012Validator.check_schema(written)
    assert set(written["properties"]) == {setting.name for setting in settings_of(kind)}
    assert all(each["description"] for each in written["properties"].values())
    jsonschema.validate({s.name: plain(s.default) for s in settings_of(kind) if not s.required}, written)


@pytest.mark.parametrize(
    "said",
    [{"block-size": 8}, {"block_size": 8}, {"max_num_batched-tokens": 9}, {"limit-mm-per-prompt": {"image": 4}}],
)
def test_the_schema_spells_a_name_as_a_file_may(said: dict[str, Any], file: Path) -> None:
    jsonschema.validate(said, schema(ServeOptions))
    file.write_text("\n".join(f"{name}: {value}" for name, value in said.items()))
    read(ServeOptions, {}, file)


@pytest.mark.parametrize(
    "wrong", [{"prot": 1}, {"port_": 1}, {"block_size": "x"}, {"port": "http"}, {"dtype": "float8"}, {"api-key": [1]}]
)
def test_the_schema_refuses_what_a_file_must_not_say(wrong: dict[str, Any]) -> None:
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(wrong, schema(ServeOptions))
