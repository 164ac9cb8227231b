"""Left out of the source distribution: what `PipelineTesterMixin` calls for the tasks of text models."""

import torch
from transformers import pipeline


OPTIONS = {
    "text-generation": {"min_new_tokens": 4, "max_new_tokens": 4, "do_sample": False},
    "zero-shot": {"candidate_labels": ["one", "another"]},
}


class PipelineTests:
    task = None

    def get_test_pipeline(self, model, tokenizer, dtype="float32", **processors):
        task = {"zero-shot": "zero-shot-classification"}.get(self.task, self.task)
        # The option dtype of a pipeline has no effect on a model that is already there
        model = model.to(getattr(torch, dtype))
        pipe = pipeline(task, model=model, tokenizer=tokenizer, **OPTIONS.get(self.task, {}))
        return pipe, ["this is a test", "one and another"]

    def run_pipeline_test(self, pipe, examples):
        for example in examples:
            getattr(self, f"check_{self.task.replace('-', '_')}")(pipe, example, pipe(example))

    def check_feature_extraction(self, pipe, example, features):
        assert torch.tensor(features).shape == (1, len(example.split()), pipe.model.config.hidden_size)
        assert torch.tensor(features).isfinite().all()

    def check_text_generation(self, pipe, example, outputs):
        assert [output["generated_text"].startswith(example) for output in outputs] == [True]
        without_prompt = pipe(example, return_full_text=False)[0]["generated_text"]
        assert without_prompt and outputs[0]["generated_text"] == example + without_prompt
        assert len(pipe(example, do_sample=True, num_return_sequences=2)) == 2

    def check_text_classification(self, pipe, example, outputs):
        assert len(outputs) == 1
        outputs = pipe(example, top_k=None)
        assert {output["label"] for output in outputs} == set(pipe.model.config.label2id)
        assert all(0 <= output["score"] <= 1 for output in outputs)

    def check_token_classification(self, pipe, example, outputs):
        assert [output["word"] for output in outputs] == example.split()
        assert {output["entity"] for output in outputs} <= set(pipe.model.config.label2id)

    def check_zero_shot(self, pipe, example, output):
        assert output["sequence"] == example and set(output["labels"]) == set(OPTIONS["zero-shot"]["candidate_labels"])
        assert abs(sum(output["scores"]) - 1) < 1e-2
