"""What the commands that use one checkpoint share: a traced generation, the likelihood of a file, and their output."""

import json
from dataclasses import asdict
from typing import Any

from model.decoding.decode import ContinuationConfig
from scripts.engine.decoding.generation import Sampler, generate, infill
from scripts.engine.decoding.trace import RECORD
from scripts.engine.decoding.watching import Recorder
from scripts.engine.flags import in_effect
from scripts.engine.likelihood.documents import evaluate_documents
from scripts.engine.likelihood.windows import DataEvalConfig
from scripts.engine.loaded import Loaded
from scripts.engine.prompts import Blanks, Prompt


class Output:
    """The results of a command: printed as they come, or collected in one JSON object with all they depend on."""

    def __init__(self, loaded: Loaded, record: dict[str, Any], as_json: bool):
        self.loaded, self.record, self.as_json = loaded, record, as_json

    def add(self, result: dict[str, Any], *lines: str) -> None:
        """Add a result, and say it in lines."""
        self.record |= result
        if not self.as_json:
            print("\n".join(lines), flush=True)

    def generation(
        self, request: Prompt | Blanks, continuation: ContinuationConfig, sampler: Sampler, trace: str | None
    ) -> None:
        """Continue the prompt or fill the blanks, and write the trace."""
        recorder = Recorder(self.loaded.tokenizer, trace)
        about = {"prompt": request.text, "system": request.system, "checkpoint": self.loaded.path}
        info = {**about, **in_effect(sampler), RECORD: self.record}
        write = infill if isinstance(request, Blanks) else generate
        generation = write(self.loaded, request, continuation, sampler, recorder.observer(**info))
        self.record["generation"] = asdict(generation)  # before the trace is written, which holds the record
        self.add({}, generation.report(), *recorder.write())

    def documents(self, data: DataEvalConfig) -> None:
        """Add the likelihood of a file."""
        likelihoods, record = evaluate_documents(self.loaded, data)
        self.add(record, *(f"{name}: {likelihood.line()}" for name, likelihood in likelihoods.items()))

    def finish(self) -> None:
        if self.as_json:
            print(json.dumps(self.record, ensure_ascii=False))
