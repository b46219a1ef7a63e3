"""A user's own prompt around a suite's questions: the alternative to fine-tuning."""

from dataclasses import dataclass, replace
from pathlib import Path

import jinja2
from jinja2 import meta
from jinja2.sandbox import ImmutableSandboxedEnvironment

from llmtune.errors import LlmtuneError
from llmtune.evaluation.tasks.base import PromptedSuite, Suite
from llmtune.evaluation.templates import RENDERING_ERRORS, compile_template
from llmtune.io.fingerprint import hash_json

VARIABLES = {"prompt", "choices", "system"}


@dataclass(frozen=True)
class PromptFile:
    """A Jinja template over `prompt` (a suite's own question) and `choices` (where there are any).

    What the file sets as `system` (`{% set system %}...{% endset %}`) is the system message.
    """

    name: str
    path: Path
    text: str

    @property
    def fingerprint(self) -> str:
        """A hash of the text."""
        return hash_json(self.text)

    def ask(self, suite: Suite) -> Suite:
        """Return the suite with this prompt around every item's, and this system message if any.

        If a suite is raw text (`chat: false`), the system message is put before the prompt.

        Raises:
            LlmtuneError: the template cannot be rendered, or gives nothing.
        """
        config = suite.config
        assert isinstance(config, PromptedSuite)
        template = compile_template(self.text, str(self.path))
        own = self._render(template, prompt="", choices=())[0]
        system = own or config.system
        items = []
        for item in suite.items:
            text = self._render(template, prompt=item.prompt, choices=item.choices)[1]
            if not text:
                raise LlmtuneError(f"{self.path}: gives an empty prompt for item {item.id!r}")
            if system and not config.chat:
                text = f"{system}\n\n{text}"
            has_system = bool(item.messages) and item.messages[0]["role"] == "system"
            messages = item.messages[1:] if own and has_system else item.messages
            items.append(replace(item, prompt=text, messages=messages))
        if system and config.chat:
            config = config.model_copy(update={"system": system})
        return replace(suite, config=config, items=tuple(items))

    def _render(
        self, template: jinja2.Template, *, prompt: str, choices: tuple[str, ...]
    ) -> tuple[str, str]:
        """Return the system message and the text; ends of lines around them are the file's."""
        try:
            module = template.make_module({"prompt": prompt, "choices": list(choices)})
        except RENDERING_ERRORS as error:
            raise LlmtuneError(f"{self.path}: the prompt cannot be rendered: {error}") from None
        return str(getattr(module, "system", "")).strip(), str(module).strip("\n")


def read_prompt_file(name: str, path: Path) -> PromptFile:
    """Read a prompt and check it.

    Raises:
        LlmtuneError: the file is missing, is not a template, asks for unknown variables,
            or has no place for the question.
    """
    where = f"evaluate.prompts.{name}: {path}"
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise LlmtuneError(f"{where}: no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise LlmtuneError(f"{where}: cannot be read: {error}") from None
    environment = ImmutableSandboxedEnvironment()
    try:
        parsed = environment.parse(text)
    except jinja2.TemplateSyntaxError as error:
        raise LlmtuneError(f"{where}: line {error.lineno}: {error}") from None
    asked = meta.find_undeclared_variables(parsed)
    if "prompt" not in asked:
        raise LlmtuneError(f"{where}: has no place for the question; write {{{{ prompt }}}} there")
    unknown = sorted(asked - VARIABLES)
    if unknown:
        raise LlmtuneError(f"{where}: asks for {unknown[0]!r}; there are prompt and choices")
    return PromptFile(name, path, text)
