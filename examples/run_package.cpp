// Run a package of AOTInductor, made by `savl export MODEL -o network.pt2`, without Python code.
//
//     run_package network.pt2 savl/_C.cpython-311-x86_64-linux-gnu.so [image.ppm result.ppm]
//
// Without an image, it upscales random numbers of 37 x 50 pixels. docs/export.md shows how to compile it.

#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <torch/torch.h>

#include <fstream>
#include <iostream>
#include <sstream>
#include <stdexcept>
#include <string>

namespace {

// Define the ops that the package calls, from its metadata: in Python, `import savl` does this. The library registers
// their kernels.
void define_ops(const std::string& package, torch::Library& library) {
  const auto metadata = torch::inductor::AOTIModelPackageLoader::load_metadata_from_package(package, "model");
  const auto found = metadata.find("savl.schemas");
  if (found == metadata.end()) return;
  std::istringstream lines(found->second);
  for (std::string schema; std::getline(lines, schema);) {
    if (!schema.empty()) library.def(schema.c_str());
  }
}

// Read a binary PPM with 8 bits a channel as (1, 3, height, width) in [0, 1].
torch::Tensor read_ppm(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  std::string kind;
  int64_t width = 0, height = 0, largest = 0;
  file >> kind >> width >> height >> largest;
  if (!file || kind != "P6" || largest != 255 || width < 1 || height < 1) {
    throw std::runtime_error(path + " is not a binary PPM without comments and with 8 bits a channel");
  }
  file.get();
  const auto pixels = torch::empty({height, width, 3}, torch::kUInt8);
  if (!file.read(static_cast<char*>(pixels.data_ptr()), pixels.numel())) {
    throw std::runtime_error(path + " ends too early");
  }
  return pixels.permute({2, 0, 1}).unsqueeze(0).to(torch::kFloat32).div(255.0).contiguous();
}

void write_ppm(const std::string& path, const torch::Tensor& image) {
  const auto pixels = image[0].clamp(0.0, 1.0).mul(255.0).round().to(torch::kUInt8).permute({1, 2, 0}).contiguous();
  std::ofstream file(path, std::ios::binary);
  file << "P6\n" << pixels.size(1) << " " << pixels.size(0) << "\n255\n";
  file.write(static_cast<const char*>(pixels.data_ptr()), pixels.numel());
  if (!file.flush()) throw std::runtime_error("cannot write " + path);
}

int run(int argc, char** argv) {
  const torch::NoGradGuard no_grad;
  torch::Library library(torch::Library::DEF, "savl", std::nullopt, __FILE__, __LINE__);
  define_ops(argv[1], library);
  if (dlopen(argv[2], RTLD_NOW | RTLD_GLOBAL) == nullptr) throw std::runtime_error(dlerror());

  torch::inductor::AOTIModelPackageLoader loader(argv[1]);
  const auto lr = argc == 5 ? read_ppm(argv[3]) : torch::rand({1, 3, 37, 50});
  const auto sr = loader.run({lr}).at(0);
  std::cout << lr.sizes() << " -> " << sr.sizes() << ", mean " << sr.mean().item<float>() << std::endl;
  if (argc == 5) write_ppm(argv[4], sr);
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 3 && argc != 5) {
    std::cerr << "usage: run_package PACKAGE LIBRARY [IMAGE.ppm RESULT.ppm]\n";
    return 2;
  }
  try {
    return run(argc, argv);
  } catch (const std::exception& error) {
    std::cerr << error.what() << "\n";
    return 1;
  }
}
