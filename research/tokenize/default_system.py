"""A chat template that writes a system text where a conversation has none."""

# The variable of the template that holds the text; empty, none is written.
DEFAULT_SYSTEM = "default_system"


def with_default_system(template: str, system: str, takes_system: bool) -> str:
    """A template that begins a conversation without a system text with `system`.

    Other tools then ask a model as it was trained, unless they send a system message of
    their own, or set the variable `default_system`.

    Args:
      template: of the model.
      system: the text.
      takes_system: whether the template writes system messages. If not, each is written
        in front of the first message of the user.
    """
    text = ascii(system)  # Jinja reads the escapes of Python.
    own = (
        f"{{%- if {DEFAULT_SYSTEM} is not defined %}}"
        f"{{%- set {DEFAULT_SYSTEM} = {text} %}}{{%- endif %}}"
        f"{{%- if {DEFAULT_SYSTEM} and messages[0]['role'] != 'system' %}}"
        "{%- set messages = [{'role': 'system', 'content': "
        f"{DEFAULT_SYSTEM}}}] + messages %}}{{%- endif %}}"
    )
    folds = (
        "{%- if messages[0]['role'] == 'system' and messages[0]['content'] %}"
        "{%- set messages = [{'role': messages[1]['role'], 'content': messages[0]"
        "['content'] + '\\n\\n' + messages[1]['content']}] + messages[2:] %}"
        "{%- endif %}"
    )
    return own + ("" if takes_system else folds) + template
