// Greedy tokens with onnxruntime-genai's C++ API on a unified package: genai PACKAGE PROMPT [NEW_TOKENS]
//
// Compile with the headers and libraries of onnxruntime-genai's release, or with the header of its repository and the
// library of the Python package (check.py does):
//     g++ -std=c++17 genai.cpp -I INCLUDE -L LIB -lonnxruntime-genai -Wl,-rpath,LIB -o genai

#include <cstdlib>
#include <iostream>
#include <memory>

#include "ort_genai.h"

int main(int count, char** arguments) {
  if (count < 3) {
    std::cerr << "usage: genai PACKAGE PROMPT [NEW_TOKENS]\n";
    return 2;
  }
  const int new_tokens = count > 3 ? std::atoi(arguments[3]) : 32;
  try {
    auto model = OgaModel::Create(arguments[1]);
    auto tokenizer = OgaTokenizer::Create(*model);
    auto prompt = OgaSequences::Create();
    tokenizer->Encode(arguments[2], *prompt);
    const size_t before = prompt->SequenceCount(0);

    auto params = OgaGeneratorParams::Create(*model);
    params->SetSearchOption("max_length", static_cast<double>(before + new_tokens));
    params->SetSearchOption("min_length", static_cast<double>(before + new_tokens));
    params->SetSearchOptionBool("do_sample", false);
    auto generator = OgaGenerator::Create(*model, *params);
    generator->AppendTokenSequences(*prompt);
    while (!generator->IsDone()) generator->GenerateNextToken();

    const int32_t* tokens = generator->GetSequenceData(0);
    std::cout << "[";
    for (size_t i = before; i < generator->GetSequenceCount(0); ++i) {
      std::cout << (i > before ? ", " : "") << tokens[i];
    }
    std::cout << "]\n";
  } catch (const std::exception& error) {
    std::cerr << error.what() << "\n";
    return 1;
  }
}
