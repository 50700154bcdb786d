"""Every leak of the lab is found by the proofs that it says and by no other, and is not written on its model."""

import pytest
import torch

import e3va_lite
from e3va_lite.analysis import leaks

ONE_OF_A_KIND = {leak.kind: leak for leak in leaks.LEAKS}


def found_by(model: torch.nn.Module) -> tuple[int, ...]:
    return tuple(proof for proof, found in leaks.findings(model).items() if found)


def test_there_are_enough_leaks():
    for kind in leaks.KINDS:
        there = {(leak.place, leak.stage) for leak in leaks.LEAKS if leak.kind == kind}
        assert {(place, stage) for place in ("attention", "mlp") for stage in leaks.STAGES} <= there
    assert len(leaks.LEAKS) == len({leak[:3] for leak in leaks.LEAKS}) == 46


def test_without_a_leak_no_proof_finds_anything_and_the_function_is_the_packages():
    clean = leaks._planted(None)
    assert found_by(clean) == ()
    e3va_lite.assert_isolated(clean, images := torch.randn(2, 3, 40, 64))
    package = e3va_lite.E3VA(clean.backbone, leaks.STAGES, memory="reference")
    package.adapters, package.norms = clean.adapters, clean.norms
    for mine, right in zip(clean.eval()(images), package.eval()(images), strict=True):
        torch.testing.assert_close(mine, right)


@pytest.mark.parametrize("leak", ONE_OF_A_KIND.values(), ids=lambda leak: leak.kind)
def test_a_leak_is_found_by_its_proofs_alone(leak):
    assert found_by(leaks._planted(leak)) == leak.proofs


@pytest.mark.slow
@pytest.mark.parametrize("leak", leaks.LEAKS, ids=lambda leak: f"{leak.kind}-{leak.place}-{leak.stage}")
def test_every_leak_is_found_by_its_proofs_alone_where_it_is(leak):
    found = leaks.findings(leaks._planted(leak))
    assert tuple(proof for proof, lines in found.items() if lines) == leak.proofs
    first = found[leak.proofs[-1]][0]  # proof 5 names what lies behind, too
    stage = f"layers.{leak.stage - 1}" if leak.kind != "cut" else f"adapters.{leak.stage - 1}"
    assert f"{stage}." in first
    if leak.kind != "mode":
        lines = [line for proof in leak.proofs for line in found[proof]]
        assert all(f"{stage}." in line for line in lines), "the leak stays where it is"


def test_a_name_has_always_the_same_leaks():
    drawn = [leaks.answer("ada", number) for number in range(1, 101)]
    assert drawn == [leaks.answer(" Ada ", number) for number in range(1, 101)]
    # Drawn otherwise than before, what was handed in becomes wrong.
    assert [leak[:3] for leak in drawn[:2]] == [("flags", "attention", 3), ("highway", "mlp", 4)]
    for five in range(0, 100, 5):
        assert {leak.kind for leak in drawn[five : five + 5]} == leaks.KINDS.keys()
    assert len({leak[:3] for leak in drawn}) > 30


def test_names_have_leaks_of_their_own():
    assignments = {tuple(leaks.answer(f"student {i}", -n)[:3] for n in (1, 2, 3)) for i in range(40)}
    assert len(assignments) == 40
    assert all(len({kind for kind, _, _ in three}) == 3 for three in assignments)


def test_a_suspect_is_the_model_with_the_leak_of_its_name_and_number():
    leak, images = leaks.answer("ada", 1), torch.randn(1, 3, 32, 32)
    one, two = leaks.suspect("ada", 1), leaks.suspect("Ada", 1)
    assert found_by(one) == leak.proofs
    for a, b in zip(one.eval()(images), two.eval()(images), strict=True):
        assert torch.equal(a, b)


def test_no_attribute_of_a_suspect_says_what_its_leak_is():
    model = leaks.suspect("ada", 1)
    held = [value for module in model.modules() for value in vars(module).values()]
    words = {*leaks.KINDS, *leaks.PLACES}
    assert not [value for value in held if isinstance(value, leaks.Leak) or (isinstance(value, str) and value in words)]
    assert repr(model) == repr(leaks.suspect("ada", 2))


def test_confirm_says_what_is_wrong():
    kind, place, stage, _ = leaks.answer("ada", 1)
    assert leaks.confirm("ada", 1, kind, place, stage).startswith(f"right: {leaks.KINDS[kind]}")
    assert leaks.confirm("ada", 1, kind, place, stage % 4 + 1) == "not yet: wrong stage"
    other = "mlp" if place == "attention" else "attention"
    assert leaks.confirm("ada", 1, kind, other, stage % 4 + 1) == "not yet: wrong place and stage"


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: leaks.suspect(" ", 1), "the name is empty"),
        (lambda: leaks.suspect("ada", 0), "there is no leak 0: practise on 1, 2, 3"),
        (lambda: leaks.suspect("ada", -4), "there is no leak -4"),
        (lambda: leaks.confirm("ada", 1, "flag", "mlp", 1), "unknown kind 'flag': did you mean flags"),
        (lambda: leaks.confirm("ada", 1, "flags", "mlp", 5), "unknown stage '5': known are: 1, 2, 3, 4"),
        (lambda: leaks.confirm("ada", -1, "flags", "mlp", 1), "leak -1 is a task"),
    ],
)
def test_bad_input_is_a_sentence(call, message):
    with pytest.raises(e3va_lite.InputError, match=message):
        call()
