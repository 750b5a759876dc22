# What puma and unicorn serve.
release = File.read(ENV.fetch("RELEASE_FILE"))
abort "a release that does not start" if release == "broken"
sleep ENV.fetch("IMPORT_SECONDS").to_f

run(lambda do |environment|
  parts = environment["PATH_INFO"].split("/").reject(&:empty?)
  sleep parts[1].to_f if parts[0] == "slow"
  body = "#{release} #{parts[-1]}"
  [200, { "content-type" => "text/plain", "content-length" => body.bytesize.to_s }, [body]]
end)
