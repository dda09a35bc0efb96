"""What LoPT-PP is measured by. README.md says what each benchmark is for; each is run as a module from the checkout."""
