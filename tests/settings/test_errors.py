import inspect

from klein import errors
from klein.entrypoints.cli.exit_codes import exit_code
from klein.entrypoints.http.errors import http_status
from klein.errors import ErrorCode, KleinError, unknown


def _classes() -> list[type[KleinError]]:
    found = [c for _, c in inspect.getmembers(errors, inspect.isclass) if issubclass(c, KleinError)]
    return [c for c in found if c is not KleinError]


def test_every_code_has_exactly_one_class() -> None:
    """A code no class raises, or two classes with one code, would mislead a caller."""
    assert sorted(c.code for c in _classes()) == sorted(ErrorCode)


def test_the_module_docstring_lists_every_class() -> None:
    """The tree in the docstring is the documentation of the tree."""
    assert errors.__doc__ is not None
    for c in _classes():
        assert c.__name__ in errors.__doc__


def test_doors_map_every_code() -> None:
    """HTTP statuses are errors; what may be retried is never the caller's fault."""
    for c in _classes():
        assert 400 <= http_status(c.code) < 600
        assert exit_code(c.code) != 0
        if c.retryable:
            assert http_status(c.code) in (408, 429, 502, 503, 504)
            assert exit_code(c.code) == 75


def test_wire_shape() -> None:
    """Every error has the same five fields."""
    assert errors.LoraError("gone", field="loras").as_dict("id1") == {
        "code": "lora_failed",
        "message": "gone",
        "field": "loras",
        "retryable": False,
        "request_id": "id1",
    }


def test_unknown_names_the_nearest() -> None:
    """A misspelt or half-remembered name leads to the right one, and all are listed."""
    known = ["num_inference_steps", "guidance_scale", "seed"]
    assert "did you mean 'num_inference_steps'?" in unknown("field", "steps", known)
    assert "did you mean 'guidance_scale'?" in unknown("field", "guidance", known)
    assert "did you mean" not in unknown("field", "zzz", known)
    assert unknown("field", "zzz", known).endswith("num_inference_steps, guidance_scale, seed")
    assert len(unknown("field", "z" * 1_000_000, known)) < 200
