"""What the import-linter contracts in .importlinter can't say."""

import grimp


def test_dashtam_imports_no_private_module_of_whereupon() -> None:
    graph = grimp.build_graph("whereupon", "dashtam", cache_dir=None)
    private = {module for module in graph.modules if module.startswith("whereupon._")}
    borrowed = {
        f"{importer} imports {module}"
        for module in private
        for importer in graph.find_modules_that_directly_import(module)
        if importer.partition(".")[0] == "dashtam"
    }
    assert private, "nothing looked at: has the library no private module any more?"
    assert not borrowed
