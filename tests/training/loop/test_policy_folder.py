"""The policy folder: what is uploaded to the hub."""

from types import SimpleNamespace

from training.loop import policy_folder


def test_what_goes_to_the_hub_is_private_and_holds_no_data(tmp_path, monkeypatch, capsys):
    import huggingface_hub

    for name in (
        "model.safetensors", "config.json", "README.md", "chat_template.jinja", "manifest.json",
        "recipe.json", "place.json", "stats.json", ".progress.json", "error.txt", "train_log.parquet", "completions-00001.parquet",
        "adapter/adapter_model.safetensors", "state/optimizer.safetensors", "last/model.safetensors",
        "adapted.json", "earlier/1/adapter_model.safetensors", "generation_config.json",
    ):  # fmt: skip
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
    uploads = []

    class Stub:
        def create_repo(self, repository, *, private, exist_ok):
            assert private

        def repo_info(self, repository):
            return SimpleNamespace(private=repository != "me/public")

        def upload_folder(self, **options):
            paths = [str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file()]
            uploads.extend(
                huggingface_hub.utils.filter_repo_objects(
                    paths,
                    allow_patterns=options["allow_patterns"],
                    ignore_patterns=options["ignore_patterns"],
                )
            )

    monkeypatch.setattr(huggingface_hub, "HfApi", Stub)
    policy_folder.push(tmp_path, "me/policy")
    assert sorted(uploads) == [
        "README.md",
        "adapter/adapter_model.safetensors",
        "chat_template.jinja",
        "config.json",
        "earlier/1/adapter_model.safetensors",
        "generation_config.json",
        "model.safetensors",
    ]
    assert "me/policy" in capsys.readouterr().out

    before = len(uploads)
    policy_folder.push(tmp_path, "me/public")
    assert len(uploads) == before
    assert "it is there and public" in capsys.readouterr().out

    class Down(Stub):
        def create_repo(self, *_, **__):
            raise OSError("no network")

    monkeypatch.setattr(huggingface_hub, "HfApi", Down)
    policy_folder.push(tmp_path, "me/policy")
    assert "was not uploaded: no network" in capsys.readouterr().out
