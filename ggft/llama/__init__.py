"""llama.cpp through llama-cpp-python: vocabulary, tokenizer and generation."""
