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
    # With `trim_blocks`, a line end behind a block is dropped. If there were none here,
    # that of the template itself would be dropped, and its indent would be kept.
    own = (
        f"{{%- if {DEFAULT_SYSTEM} is not defined %}}"
        f"{{%- set {DEFAULT_SYSTEM} = {text} %}}{{%- endif %}}"
        f"{{%- if {DEFAULT_SYSTEM} and messages and messages[0]['role'] != 'system' %}}"
        "{%- set messages = [{'role': 'system', 'content': "
        f"{DEFAULT_SYSTEM}}}] + messages %}}{{%- endif %}}\n"
    )
    # A content is a text, or a list of parts.
    folds = (
        "{%- if messages | length > 1 and messages[0]['role'] == 'system' and "
        "messages[0]['content'] %}"
        "{%- set folded = messages[:2] | map(attribute='content') | list %}"
        "{%- if folded[0] is string and folded[1] is string %}"
        "{%- set folded = folded | join('\\n\\n') %}{%- else %}"
        "{%- set folded = ([{'type': 'text', 'text': folded[0]}] if folded[0] is string"
        " else folded[0]) + [{'type': 'text', 'text': '\\n\\n'}] + ([{'type': 'text', "
        "'text': folded[1]}] if folded[1] is string else folded[1]) %}{%- endif %}"
        "{%- set messages = [{'role': messages[1]['role'], 'content': folded}] + "
        "messages[2:] %}{%- endif %}\n"
    )
    return own + ("" if takes_system else folds) + template
