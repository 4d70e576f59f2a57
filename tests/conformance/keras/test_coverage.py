import pytest

from penstock.converters.conversion import _quiet_tensorflow

_quiet_tensorflow()
keras = pytest.importorskip("keras")

from tests.conformance.keras import activations, coverage  # noqa: E402 TensorFlow must find its settings


def test_the_document_is_what_the_tests_prove() -> None:
    assert coverage.DOCUMENT.read_text(encoding="utf-8") == coverage.document(), "run `make coverage`"


def test_every_layer_has_a_case_or_a_reason_why_not() -> None:
    cases = [case for group in coverage.LAYER_GROUPS.values() for case in group]
    assert coverage.classes_of(cases) | coverage.WITHOUT_A_CASE.keys() == coverage.public_layers()
    assert not coverage.classes_of(cases) & coverage.WITHOUT_A_CASE.keys()


def test_every_activation_has_a_case() -> None:
    helpers = {"deserialize", "get", "serialize"}
    functions = {getattr(keras.activations, name) for name in dir(keras.activations) if name[0] != "_"}
    assert {getattr(keras.activations, name) for name in activations.NAMES} == {
        function for function in functions if function.__name__ not in helpers
    }


def test_names_of_cases_are_their_own() -> None:
    for title, cases in coverage.GROUPS.items():
        names = [case.name for case in cases]
        assert len(names) == len(set(names)), title
