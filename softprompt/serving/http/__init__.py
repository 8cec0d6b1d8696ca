"""An OpenAI-compatible server over an engine: `model` names the task."""
