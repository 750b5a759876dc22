"""A setting is called by the name that it was given where the service was configured."""

from __future__ import annotations

from ecdysis_async._system import wording


def test_options_for_users_of_the_command_and_settings_for_others() -> None:
    assert wording.name_setting("ready_timeout") == "ready_timeout"
    wording.speak_of_options()
    assert wording.name_setting("ready_timeout") == "--ready-timeout"
