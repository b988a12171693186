from fastlora.cli import main

main()
