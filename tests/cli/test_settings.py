"""Settings: TOML, --set, and what a mistake gets."""

import tomllib

import pytest

from eellm.settings import apply_overrides, as_values, dump_toml, load_toml
from eellm.train.run import SCHEMA, RunSettings

VALUES = {
    "model": {
        "hidden_size": 64,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "vocab_size": 100,
        "exits": [{"layer": 1, "head": "norm"}, {"layer": 2, "branch": "block", "norm": "none"}],
    },
    "data": {"train": ["a", "b"], "weights": [1, 3]},
    "train": {"steps": 7, "learning_rate": 0.5},
}


def overridden(*items):
    return RunSettings.from_values(apply_overrides(SCHEMA, VALUES, items))


def refused(*items):
    with pytest.raises(ValueError) as error:
        overridden(*items)
    return str(error.value)


def test_the_complete_toml_reads_back_the_same():
    text = overridden().to_toml()
    again = RunSettings.from_values(tomllib.loads(text))
    assert again.to_toml() == text
    assert again.train == overridden().train and again.data == overridden().data
    assert again.model.config() == overridden().model.config()


def test_defaults_alone_read_back_the_same():
    values = {"model": {**VALUES["model"], "exits": []}}
    text = RunSettings.from_values(values).to_toml()
    assert RunSettings.from_values(tomllib.loads(text)).to_toml() == text


def test_a_pretrained_model_reads_back_the_same():
    values = {"model": {"pretrained": "gpt2", "exits": [{"layer": 3, "head": "mlp"}]}}
    text = RunSettings.from_values(values).to_toml()
    again = RunSettings.from_values(tomllib.loads(text))
    assert again.to_toml() == text and again.model.values["exits"][0].branch == "mlp"
    values["model"]["hidden_size"] = 3
    with pytest.raises(ValueError, match=r"model.hidden_size \(expected nothing but exits"):
        RunSettings.from_values(values)


@pytest.mark.parametrize(
    ("item", "path", "wanted"),
    [
        ("train.learning_rate=1e-3", ("train", "learning_rate"), 1e-3),
        ("train.steps=1_000", ("train", "steps"), 1000),
        ("train.steps=1e3", ("train", "steps"), 1000),
        ("train.dynamic_exit_weights=true", ("train", "dynamic_exit_weights"), True),
        ("train.exit_weights=0.1,0.2", ("train", "exit_weights"), (0.1, 0.2)),
        ("train.exit_weights=[0.1, 1]", ("train", "exit_weights"), (0.1, 1.0)),
        ("train.exit_weights=0.5", ("train", "exit_weights"), (0.5,)),
        ("train.schedule=wsd", ("train", "schedule"), "wsd"),
        ('train.schedule="wsd"', ("train", "schedule"), "wsd"),
        ("data.train=one", ("data", "train"), ("one",)),
        ("data.train.1=c=d", ("data", "train"), ("a", "c=d")),
        ("data.tokenizer=none", ("data", "tokenizer"), None),
        ("output.folder=my runs/1", ("output", "folder"), "my runs/1"),
    ],
)
def test_set_reads_the_value_as_the_field_wants_it(item, path, wanted):
    settings = overridden(*([item, "data.weights=[]"] if item.startswith("data") else [item]))
    got = getattr(getattr(settings, path[0]), path[1])
    assert got == wanted and type(got) is type(wanted)


def test_set_reaches_into_lists_of_tables():
    config = overridden("model.exits.1.layer=3", "model.exits.0.head=block").model.config()
    assert [each.layer for each in config.exits] == [1, 3]
    assert config.exits[0].branch == "block"


def test_set_can_replace_a_list_of_tables():
    config = overridden('model.exits=[{layer = 2, head = "mlp"}]').model.config()
    assert [(each.layer, each.branch) for each in config.exits] == [(2, "mlp")]


@pytest.mark.parametrize(
    ("item", "parts"),
    [
        ("train.lerning_rate=1", ["train.lerning_rate", "did you mean train.learning_rate?"]),
        ("trian.steps=1", ["unknown section trian", "did you mean train?"]),
        ("train.steps=many", ["train.steps", "a whole number", "'many'"]),
        ("train.steps=1.5", ["train.steps", "a whole number", "1.5"]),
        ("train.steps=0", ["[train] steps", "at least 1"]),
        ("train.schedule=cosin", ["train.schedule", "did you mean cosine?"]),
        ("train.exit_weights=a,b", ["train.exit_weights[0]", "a number"]),
        ("model.exits.5.layer=1", ["model.exits.5", "an index below 2"]),
        ("model.exits.x.layer=1", ["model.exits.x", "an index from 0"]),
        ("model.exits.0.laier=1", ["model.exits.0.laier", "did you mean model.exits.0.layer?"]),
        ("model.exits.0.layer=9", ["layer of early exit 0", "4", "9"]),
        ("model.num_attention_heads=5", ["num_attention_heads", "64", "5"]),
        ("train.steps", ["--set", "section.key=value"]),
        ("steps=1", ["--set", "section.key=value"]),
        ("train.steps.x=1", ["train.steps.x", "without anything below"]),
    ],
)
def test_a_mistake_names_the_key_and_what_was_expected(item, parts):
    text = refused(item)
    for part in parts:
        assert part in text, text
    assert "(expected " in text and "got " in text


def test_missing_values_and_unknown_keys_are_named():
    with pytest.raises(ValueError, match=r"model.exits\[0\].layer is missing"):
        RunSettings.from_values({"model": {**VALUES["model"], "exits": [{"head": "mlp"}]}})
    with pytest.raises(ValueError, match=r"unknown key data.trian .*did you mean data.train"):
        RunSettings.from_values({"data": {"trian": "x"}})
    with pytest.raises(ValueError, match="data has the wrong type"):
        RunSettings.from_values({"data": 3})


def test_files_that_are_no_settings(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no settings file"):
        load_toml(tmp_path / "none.toml")
    path = tmp_path / "bad.toml"
    path.write_text("train = [")
    with pytest.raises(ValueError, match="is no TOML"):
        load_toml(path)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match="UTF-8"):
        load_toml(path)
    with pytest.raises(ValueError, match="folder"):
        load_toml(tmp_path)


def test_the_writer_writes_what_tomllib_reads():
    values = {
        "text": 'a "quoted"\\ \n\t\x01 line \u00e9',
        "numbers": [1, -2, 0],
        "floats": [1e-8, 1e22, 0.1, -3.0, 1e16, float("inf")],
        "flag": True,
        "odd key": {"inner": {"x": 1}},
        "tables": [{"a": 1, "b": [1, 2]}, {"c": {"d": "e"}}],
        "empty": [],
    }
    assert tomllib.loads(dump_toml(values)) == values


def test_none_is_left_out():
    assert "tokenizer" not in as_values(overridden().data)
