import pytest

from dashtam.domain.user import InvalidEmail, User, WeakPassword


def test_a_user_is_made_with_the_address_as_it_is_written_to() -> None:
    assert User.create(email="Ada.Lovelace@EXAMPLE.com").email == "Ada.Lovelace@example.com"


@pytest.mark.parametrize(
    "email",
    [
        "",
        "ada",
        "ada@",
        "ada@localhost",
        "ada@example",
        "ada@@example.com",
        "ada@example.com, eve@example.com",
        "ada@example.com\r\nBcc: eve@example.com",
        "ada\x00@example.com",
        "<script>@example.com",
        "\ud800@example.com",
        "a" * 65 + "@example.com",
    ],
)
def test_an_address_nobody_can_be_written_to_is_refused(email: str) -> None:
    with pytest.raises(InvalidEmail) as refused:
        User.create(email=email, password="correct horse 7")
    assert refused.value.reason == "invalid_email"


@pytest.mark.parametrize(
    ("password", "why"),
    [
        ("short 7", "10 characters or more"),
        ("nothingbutletters", "something that is none"),
        ("0123456789", "letters"),
        ("half a pair \ud800", "whole characters"),
        ("ADA.lovelace@example.com", "not the email address"),
        ("a1" * 501, "1000 characters at most"),
    ],
)
def test_a_password_that_is_easily_guessed_is_refused(password: str, why: str) -> None:
    with pytest.raises(WeakPassword, match=why):
        User.create(email="ada.lovelace@example.com", password=password)


@pytest.mark.parametrize("password", ["password123", "correct horse", "пароль-пароль", "x" * 9 + "1"])
def test_ten_characters_that_are_not_all_letters_will_do(password: str) -> None:
    assert User.create(email="ada@example.com", password=password).new_password == password


def test_somebody_who_was_invited_has_no_password_yet() -> None:
    user = User.create(email="ada@example.com")
    assert user.new_password is None
    assert user.password_hash is None


def test_a_changed_password_is_held_to_the_same_rules() -> None:
    user = User.create(email="ada@example.com")
    with pytest.raises(WeakPassword):
        user.change_password("short 7")
    assert user.new_password is None


def test_no_password_and_no_hash_is_shown_when_a_user_is_printed() -> None:
    user = User.create(email="ada@example.com", password="correct horse 7")
    user.password_hash = "$argon2id$…"
    assert "correct horse" not in repr(user)
    assert "argon2" not in repr(user)
